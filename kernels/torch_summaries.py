"""What pages say of their keys, on the PyTorch path: bounds and sums, brought up to date on append.

What it computes: `reference_summaries.summarise`. Which blocks a step touches is worked out once;
every layer then goes over all heads and sequences at once. Only blocks of one sequence go one after
the other, and of these only what the law orders: a span, and float32 sums.
"""

from dataclasses import dataclass

import torch

from headlong.kernels.batch import AttentionBatch, GroupBatch
from headlong.kernels.layout import SPAN_BLOCKS, LayerHeads, PageLayout
from headlong.kernels.torch_pages import KEYS, VALUES, GroupPages


@dataclass(frozen=True, slots=True)
class BoundsPlan:
    """Blocks that got tokens, cut into segments: of one sequence, and of one span.

    Attributes:
        blocks: int64 [num_touched].
        written: bool [num_touched, 1, block_size, 1], which slots hold a token.
        segments: int64 [num_touched], segment of each.
        num_segments: How many there are.
        columns: int64 [num_touched], place within the segment, from 1.
        width: Places of the longest segment, place 0 included.
        goes_on: int64 [num_going_on], segments whose span began before.
        before: int64 [num_going_on], the block before each of these.
    """

    blocks: torch.Tensor
    written: torch.Tensor
    segments: torch.Tensor
    num_segments: int
    columns: torch.Tensor
    width: int
    goes_on: torch.Tensor
    before: torch.Tensor


@dataclass(frozen=True, slots=True)
class SumsPlan:
    """Blocks that got their first token, the first ones of all sequences, then the second ones.

    Attributes:
        blocks: int64 [num_begun].
        before: int64 [num_begun], the block before each.
        counted: bool [num_begun, 1, 1, block_size, 1], which tokens of that are to be added.
        first: bool [rounds[0], 1, 1, 1], whether the block before has sums to go on from.
        rounds: How many are first ones, second ones and so on; none are more than those before.
    """

    blocks: torch.Tensor
    before: torch.Tensor
    counted: torch.Tensor
    first: torch.Tensor
    rounds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SummaryPlan:
    """What a step changes in the summaries of one group.

    Attributes:
        bounds: None if the group's pages have none.
        sums: None if they have none, or none begins.
    """

    bounds: BoundsPlan | None
    sums: SumsPlan | None


def plan_summaries(
    page: PageLayout, tables: GroupBatch, batch: AttentionBatch, device: torch.device
) -> SummaryPlan:
    """Work out once a step which summaries of a group change.

    Args:
        page: The group's page layout.
        tables: The group's tables, on the CPU.
        batch: The batch they are of.
        device: Where the plan's tensors go.
    """
    contexts = batch.context_lens.long()
    starts = contexts - batch.cu_seqlens_q.long().diff()
    return SummaryPlan(
        bounds=_plan_bounds(tables, starts, contexts, page.block_size, device)
        if page.summarised
        else None,
        sums=_plan_sums(tables, starts, contexts, page.block_size, device)
        if page.compensated
        else None,
    )


def find_blocks(tables: GroupBatch, seqs: torch.Tensor, logical: torch.Tensor) -> torch.Tensor:
    """Block at a logical index of each sequence.

    Args:
        tables: The group's tables.
        seqs: int64 [...].
        logical: int64 [...], of blocks that are still owned.

    Returns:
        int64 [...].
    """
    sink_blocks = tables.sink_blocks[seqs]
    gone = torch.where(logical < sink_blocks, 0, tables.window_starts[seqs] - sink_blocks)
    return tables.block_tables[seqs, logical - gone].long()


def read_tokens(
    pages: GroupPages, heads: LayerHeads, blocks: torch.Tensor, which: int
) -> torch.Tensor:
    """K or V that blocks hold.

    Args:
        pages: The group's pages.
        heads: Whose.
        blocks: int64 [num_blocks].
        which: `KEYS` or `VALUES`.

    Returns:
        float32 [num_blocks, heads, block_size, head_dim].
    """
    numbers = pages.numbers(heads, blocks[:, None, None])
    tokens = pages.read(which, numbers, torch.float32)
    return tokens.view(*numbers.shape[:2], *tokens.shape[1:])


def update_summaries(pages: GroupPages, heads: LayerHeads, plan: SummaryPlan) -> None:
    """Bring a layer's summaries up to date; its new K and V are written.

    Args:
        pages: The group's pages, changed in place.
        heads: The layer's heads in the group.
        plan: The step's.
    """
    if plan.bounds is not None:
        _update_bounds(pages, heads, plan.bounds)
    if plan.sums is not None:
        _update_sums(pages, heads, plan.sums)


def _plan_bounds(
    tables: GroupBatch,
    starts: torch.Tensor,
    contexts: torch.Tensor,
    block_size: int,
    device: torch.device,
) -> BoundsPlan:
    seqs, logical, rank = _runs(starts // block_size, -(-contexts // block_size))
    begins = (rank == 0) | (logical % SPAN_BLOCKS == 0)
    segments = begins.cumsum(0) - 1
    columns = 1 + torch.arange(len(seqs)) - begins.nonzero()[segments, 0]
    goes_on = (rank == 0) & (logical % SPAN_BLOCKS > 0)
    written = torch.arange(block_size) < (contexts[seqs] - logical * block_size)[:, None]
    return BoundsPlan(
        blocks=find_blocks(tables, seqs, logical).to(device),
        written=written[:, None, :, None].to(device),
        segments=segments.to(device),
        num_segments=int(segments[-1]) + 1,
        columns=columns.to(device),
        width=int(columns.max()) + 1,
        goes_on=segments[goes_on].to(device),
        before=find_blocks(tables, seqs[goes_on], logical[goes_on] - 1).to(device),
    )


def _plan_sums(
    tables: GroupBatch,
    starts: torch.Tensor,
    contexts: torch.Tensor,
    block_size: int,
    device: torch.device,
) -> SumsPlan | None:
    seqs, logical, rank = _runs(-(-starts // block_size), -(-contexts // block_size))
    if not len(seqs):
        return None
    # Of each round the longest sequences first: those that go on are the first of the next.
    lengths = torch.bincount(seqs, minlength=len(starts))[seqs]
    order = (rank * (int(lengths.max()) + 1) - lengths).argsort(stable=True)
    seqs, logical, rank = seqs[order], logical[order], rank[order]
    has_before = logical > 0
    logical_before = (logical - 1).clamp(min=0)
    positions = logical_before[:, None] * block_size + torch.arange(block_size)
    counted = has_before[:, None] & (positions >= tables.sink_sizes[seqs, None])
    rounds: list[int] = torch.bincount(rank).tolist()
    return SumsPlan(
        blocks=find_blocks(tables, seqs, logical).to(device),
        before=find_blocks(tables, seqs, logical_before).to(device),
        counted=counted[:, None, None, :, None].to(device),
        first=has_before[: rounds[0], None, None, None].to(device),
        rounds=tuple(rounds),
    )


def _runs(
    first: torch.Tensor, end: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequence, logical index and rank of the blocks from `first` to `end` - 1 of each sequence."""
    counts = (end - first).clamp(min=0)
    seqs = torch.repeat_interleave(counts)
    rank = torch.arange(len(seqs)) - (counts.cumsum(0) - counts)[seqs]
    return seqs, first[seqs] + rank, rank


def _update_bounds(pages: GroupPages, heads: LayerHeads, plan: BoundsPlan) -> None:
    bounds = pages.bounds
    assert bounds is not None
    keys = read_tokens(pages, heads, plan.blocks, KEYS)
    # What no token was written to may hold anything: the first slot's stands in for it.
    least, greatest = torch.aminmax(torch.where(plan.written, keys, keys[:, :, :1]), dim=2)
    own = torch.stack([-least, greatest], dim=2)
    grid = own.new_full((plan.num_segments, plan.width, *own.shape[1:]), -torch.inf)
    before = bounds[_pages_of(pages, heads, plan.before), 2:].float()
    grid[plan.goes_on, 0] = torch.stack([-before[:, :, 0], before[:, :, 1]], dim=2)
    grid[plan.segments, plan.columns] = own
    for column in range(1, plan.width):
        torch.maximum(grid[:, column], grid[:, column - 1], out=grid[:, column])
    span = grid[plan.segments, plan.columns]
    found = torch.stack([least, greatest, -span[:, :, 0], span[:, :, 1]], dim=2)
    bounds[_pages_of(pages, heads, plan.blocks)] = found.to(bounds.dtype)


def _update_sums(pages: GroupPages, heads: LayerHeads, plan: SumsPlan) -> None:
    sums = pages.sums
    assert sums is not None
    tokens = [read_tokens(pages, heads, plan.before, which) for which in (KEYS, VALUES)]
    own = _sum_tokens(torch.where(plan.counted, torch.stack(tokens, dim=2), 0.0))
    found = torch.empty_like(own)
    before = _pages_of(pages, heads, plan.before[: plan.rounds[0]])
    running = torch.where(plan.first, sums[before], 0.0)
    start = 0
    for count in plan.rounds:
        running = running[:count] + own[start : start + count]
        found[start : start + count] = running
        start += count
    sums[_pages_of(pages, heads, plan.blocks)] = found


def _pages_of(pages: GroupPages, heads: LayerHeads, blocks: torch.Tensor) -> torch.Tensor:
    """Numbers of pages, int64 [num_blocks, heads]."""
    return pages.numbers(heads, blocks[:, None, None])[..., 0]


def _sum_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis but one, by halves: in an order that no shape or thread changes."""
    while tokens.shape[-2] > 1:
        half = -(-tokens.shape[-2] // 2)
        folded = tokens[..., :half, :].clone()
        folded[..., : tokens.shape[-2] - half, :] += tokens[..., half:, :]
        tokens = folded
    return tokens[..., 0, :]
