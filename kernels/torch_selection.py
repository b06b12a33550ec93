"""Which pages of a long context a decode reads, on the PyTorch path.

What it computes: `reference_selection.chosen_pages`, for all heads of a layer and many sequences at
once. What grows with the context is the scoring of spans alone, one for `SPAN_BLOCKS` pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headlong.kernels.batch import UNBOUNDED, AttentionBatch, GroupBatch, SelectionSettings
from headlong.kernels.layout import SPAN_BLOCKS, ArenaLayout, LayerHeads, PageLayout
from headlong.kernels.reference_selection import FIRST_PAGES, NEWEST_PAGES, num_spans_looked_at
from headlong.kernels.torch_hidden import HiddenKeys
from headlong.kernels.torch_pages import GroupPages

ALWAYS_READ = FIRST_PAGES + NEWEST_PAGES
"""Pages that are read whatever their scores, and are not chosen."""

SPAN_STEPS = 16
"""Choices share a bucket while the numbers of their spans differ by no more than this."""

SCORING_BYTES = 1 << 22
"""Bounds gathered at a time."""


@dataclass(frozen=True, slots=True)
class ChoiceBucket:
    """Decodes that read as many chosen pages as each other, out of contexts of similar length.

    Attributes:
        rows: int64 [num_seqs], packed row of each query.
        tables: int32 [num_seqs, max_pages], block of each page; padding repeats block 0.
        num_pages: int64 [num_seqs, 1, 1], pages of each context.
        places: int64 [num_seqs], where choices are remembered.
        renewing: int64 [num_renewing], those of the bucket that have to choose anew.
        budget_pages: Pages that each reads.
        hidden: Which keys of these are not seen: the rest of the newest page.
    """

    rows: torch.Tensor
    tables: torch.Tensor
    num_pages: torch.Tensor
    places: torch.Tensor
    renewing: torch.Tensor
    budget_pages: int
    hidden: HiddenKeys


def choosing_sequences(page: PageLayout, batch: AttentionBatch, group: GroupBatch) -> list[int]:
    """Sequences that read some of a group's pages only, in order."""
    if batch.selection is None or not page.summarised:
        return []
    budgets = batch.selection.budgets
    num_pages = -(-batch.context_lens // page.block_size)
    choosing = (
        (budgets < UNBOUNDED)
        & (num_pages > budgets // page.block_size)
        & (batch.cu_seqlens_q.diff() == 1)
        & (group.window_sizes == UNBOUNDED)
    )
    found: list[int] = choosing.nonzero().view(-1).tolist()
    return found


def plan_choices(
    page: PageLayout,
    batch: AttentionBatch,
    group: GroupBatch,
    choosing: Sequence[int],
    device: torch.device,
) -> tuple[ChoiceBucket, ...]:
    """Sort choosing sequences into buckets.

    Args:
        page: The group's pages.
        batch: The ragged batch, on the CPU.
        group: The group's tables.
        choosing: From `choosing_sequences`.
        device: Where the buckets' tensors go.
    """
    if batch.selection is None or not choosing:
        return ()
    budgets: list[int] = (batch.selection.budgets // page.block_size).tolist()
    num_pages: list[int] = (-(-batch.context_lens // page.block_size)).tolist()
    buckets: dict[tuple[int, int], list[int]] = {}
    for seq in choosing:
        steps = num_pages[seq] // (SPAN_BLOCKS * SPAN_STEPS)
        buckets.setdefault((budgets[seq], steps), []).append(seq)
    found: list[ChoiceBucket] = []
    for (budget_pages, _), seqs in buckets.items():
        index = torch.tensor(seqs)
        pages = torch.tensor([num_pages[seq] for seq in seqs])
        keys = torch.arange(budget_pages * page.block_size)
        # Chosen pages lie side by side, and all but the newest are full.
        seen = batch.context_lens[index] - (pages - budget_pages) * page.block_size
        found.append(
            ChoiceBucket(
                rows=batch.cu_seqlens_q[index].long().to(device),
                tables=group.block_tables[index, : int(pages.max())].to(device),
                num_pages=pages[:, None, None].to(device),
                places=batch.selection.places[index].long().to(device),
                renewing=batch.selection.renews[index].nonzero().view(-1).to(device),
                budget_pages=budget_pages,
                hidden=HiddenKeys.where(keys >= seen[:, None], device),
            )
        )
    return tuple(found)


class TorchSelection:
    """Chooses pages and remembers choices, for every layer.

    Args:
        pages: Of each group.
        layout: The arena's map.
        num_q_heads: Query heads of a layer.
        settings: How pages are chosen, and how much is remembered.
        device: Where it is remembered.

    Raises:
        ValueError: The budget is too small to choose any page.
    """

    def __init__(
        self,
        pages: Sequence[GroupPages],
        layout: ArenaLayout,
        num_q_heads: int,
        settings: SelectionSettings,
        device: torch.device,
    ) -> None:
        self._groups = pages
        self._min_similarity = settings.min_similarity
        self._chosen: dict[tuple[int, int], torch.Tensor] = {}
        self._queries: dict[tuple[int, int], torch.Tensor] = {}
        for layer, members in enumerate(layout.layers):
            group_size = num_q_heads // sum(len(heads.kv_heads) for heads in members)
            for heads in members:
                page = layout.pages[heads.group]
                if not page.summarised:
                    continue
                shape = settings.num_places, len(heads.kv_heads)
                self._chosen[layer, heads.group] = torch.zeros(
                    *shape, most_chosen(settings, page), dtype=torch.int32, device=device
                )
                if settings.min_similarity is not None:
                    self._queries[layer, heads.group] = torch.zeros(
                        *shape, group_size, page.head_dim, dtype=page.dtype, device=device
                    )

    def choose(
        self, layer: int, heads: LayerHeads, query: torch.Tensor, bucket: ChoiceBucket
    ) -> torch.Tensor:
        """Blocks of the pages that each head reads, in the order of their tokens.

        Args:
            layer: The layer.
            heads: Its heads in a group with bounds.
            query: [num_seqs, heads, group_size, head_dim], after RoPE.
            bucket: The sequences.

        Returns:
            int64 [num_seqs, heads, budget_pages].
        """
        remembered = self._chosen[layer, heads.group]
        count = bucket.budget_pages - ALWAYS_READ
        renewing, anew = self._renewing(layer, heads, query, bucket)
        if len(renewing):
            places = bucket.places[renewing]
            chosen = self._best_pages(heads, query[renewing], bucket, renewing).int()
            if anew is not None:
                chosen = torch.where(anew[..., None], chosen, remembered[places, :, :count])
            remembered[places, :, :count] = chosen
        chosen = remembered[bucket.places, :, :count].long()
        newest = bucket.num_pages + torch.arange(-NEWEST_PAGES, 0, device=query.device)
        first = torch.arange(FIRST_PAGES, device=query.device)
        shape = *chosen.shape[:2], -1
        pages = torch.cat([first.expand(shape), chosen, newest.expand(shape)], dim=2)
        return _blocks(bucket.tables, pages)

    def _renewing(
        self, layer: int, heads: LayerHeads, query: torch.Tensor, bucket: ChoiceBucket
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sequences that choose anew, and which heads of theirs; None for all heads."""
        if self._min_similarity is None:
            return bucket.renewing, None
        queries = self._queries[layer, heads.group]
        before = queries[bucket.places].float()
        similarity = torch.nn.functional.cosine_similarity(query.float(), before, dim=-1)
        anew = (similarity < self._min_similarity).any(-1)
        anew[bucket.renewing] = True
        seqs, kv_heads = anew.nonzero(as_tuple=True)
        queries[bucket.places[seqs], kv_heads] = query[seqs, kv_heads]
        renewing = anew.any(-1).nonzero().view(-1)
        return renewing, anew[renewing]

    def _best_pages(
        self,
        heads: LayerHeads,
        query: torch.Tensor,
        bucket: ChoiceBucket,
        seqs: torch.Tensor,
    ) -> torch.Tensor:
        """The chosen pages of each head, ascending, int64 [len(seqs), heads, chosen]."""
        tables, num_pages = bucket.tables[seqs], bucket.num_pages[seqs]
        halves = _halves(query)
        spans = torch.arange(-(-tables.shape[1] // SPAN_BLOCKS), device=query.device)[None, None]
        looked_at = num_spans_looked_at(bucket.budget_pages)
        if spans.shape[-1] > looked_at:
            last = torch.minimum((spans + 1) * SPAN_BLOCKS, num_pages) - 1
            scores = self._scores(heads, halves, _blocks(tables, last), spans=True)
            spans = _highest(scores, looked_at, spans * SPAN_BLOCKS >= num_pages)
        offsets = torch.arange(SPAN_BLOCKS, device=query.device)
        pages = (spans[..., None] * SPAN_BLOCKS + offsets).flatten(-2)
        read_anyhow = (pages < FIRST_PAGES) | (pages >= num_pages - NEWEST_PAGES)
        blocks = _blocks(tables, torch.minimum(pages, num_pages - 1))
        scores = self._scores(heads, halves, blocks, spans=False)
        best = _highest(scores, bucket.budget_pages - ALWAYS_READ, read_anyhow)
        return pages.expand(*best.shape[:2], -1).gather(2, best)

    def _scores(
        self, heads: LayerHeads, halves: torch.Tensor, blocks: torch.Tensor, *, spans: bool
    ) -> torch.Tensor:
        """Score of each block's page, or of its span up to there.

        Args:
            heads: Whose pages.
            halves: float32 [num_seqs, heads, group_size, 2 * head_dim], from `_halves`.
            blocks: int64 [num_seqs, heads or 1, blocks].
            spans: Which of the two.

        Returns:
            float32 [num_seqs, heads, blocks].
        """
        group = self._groups[heads.group]
        assert group.bounds is not None
        bounds = group.bounds[:, 2:] if spans else group.bounds[:, :2]
        bounds = bounds.flatten(1)
        num_seqs, num_heads, group_size, width = halves.shape
        rows = group.numbers(heads, blocks)
        step = max(1, SCORING_BYTES // (num_heads * blocks.shape[-1] * width * bounds.itemsize))
        found: list[torch.Tensor] = []
        for first in range(0, num_seqs, step):
            index = rows[first : first + step]
            gathered = bounds.index_select(0, index.flatten()).float()
            gathered = gathered.view(-1, blocks.shape[-1], width)
            query = halves[first : first + step].reshape(-1, group_size, width)
            products = torch.bmm(query, gathered.transpose(1, 2))
            found.append(products.amax(1).view(index.shape))
        return torch.cat(found)


def most_chosen(settings: SelectionSettings, page: PageLayout) -> int:
    """Most pages that any head has to remember.

    Raises:
        ValueError: The budget is too small to choose any page.
    """
    budget_pages = settings.budget_tokens // page.block_size
    if budget_pages <= ALWAYS_READ:
        raise ValueError(
            f"budget_tokens must be over {ALWAYS_READ} pages of {page.block_size} tokens, "
            f"got {settings.budget_tokens}"
        )
    return min(budget_pages - ALWAYS_READ, -(-settings.max_context // page.block_size))


def _halves(query: torch.Tensor) -> torch.Tensor:
    """A query so that its product with [least, greatest] is the sum of the greater products.

    max(q * least, q * greatest) = min(q, 0) * least + max(q, 0) * greatest.
    """
    query = query.float()
    return torch.cat([query.clamp(max=0), query.clamp(min=0)], dim=-1)


def _blocks(tables: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Block of each page: tables [num_seqs, max_pages] at [num_seqs, heads or 1, pages]."""
    seqs = torch.arange(len(tables), device=tables.device)[:, None, None]
    return tables[seqs, pages].long()


def _highest(scores: torch.Tensor, count: int, left_out: torch.Tensor) -> torch.Tensor:
    """Indices of the `count` highest along the last axis, of equals the lower ones; ascending."""
    # Unlike floats, these are all different: a score's bits in an order of integers (+ 0.0 makes
    # -0.0 and 0.0 equals), then the index from the end. What is left out is below even NaN.
    bits = (scores + 0.0).view(torch.int32).long()
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill_(left_out, -(2**31) - 1)
    last = scores.shape[-1] - 1
    index = torch.arange(last, -1, -1, device=scores.device)
    best = torch.topk((ordered << 31) + index, count, sorted=False).values
    return (last - (best & 0x7FFFFFFF)).sort().values
