"""Page selection on the GPU path: memory of choices, and the launches of a step.

No step waits for the device, and shapes follow from `SelectionSettings`: a CUDA graph holds them.
"""

import math

import torch

from headlong.kernels.batch import SelectionSettings
from headlong.kernels.layout import (
    SECTION_ALIGNMENT_BYTES,
    SPAN_BLOCKS,
    ArenaLayout,
    LayerHeads,
)
from headlong.kernels.reference_selection import num_spans_looked_at
from headlong.kernels.torch_selection import ALWAYS_READ, most_chosen
from headlong.kernels.triton_budget import ChoosingGroup
from headlong.kernels.triton_choice import choose_variant, drift_variant, score_variant
from headlong.kernels.triton_plan import TritonPlan


class TritonSelection:
    """Chooses pages and remembers choices, for every layer.

    Args:
        arena: uint8 [total_bytes].
        layout: The arena's map; one group has bounds.
        num_q_heads: Query heads of a layer.
        settings: How pages are chosen, and how much is remembered.

    Attributes:
        choosing: The group that has bounds, and most pages that its heads read.

    Raises:
        ValueError: Not just one group has bounds, or the budget is too small to choose any page.
    """

    def __init__(
        self,
        arena: torch.Tensor,
        layout: ArenaLayout,
        num_q_heads: int,
        settings: SelectionSettings,
    ) -> None:
        groups = [group for group, page in enumerate(layout.pages) if page.summarised]
        if len(groups) != 1:
            raise ValueError(f"one group of pages must be summarised, got groups {groups}")
        (group,) = groups
        page = layout.pages[group]
        budget_pages = most_chosen(settings, page) + ALWAYS_READ
        self.choosing = ChoosingGroup(group, page.block_size, budget_pages)
        self._page = page
        self._group_pages = layout.group_pages[group]
        base = layout.group_bases[group]
        num_bytes = layout.num_blocks[group] * layout.block_bytes(group)
        self._region = arena[base : base + num_bytes].view(page.dtype)
        self._max_spans = -(-settings.max_context // (page.block_size * SPAN_BLOCKS))
        similarity = settings.min_similarity
        self._min_similarity = -math.inf if similarity is None else similarity
        self._heads: dict[int, tuple[int, LayerHeads]] = {}
        self._chosen: dict[int, torch.Tensor] = {}
        self._queries: dict[int, torch.Tensor] = {}
        for layer, members in enumerate(layout.layers):
            group_size = num_q_heads // sum(len(heads.kv_heads) for heads in members)
            first = 0
            for heads in members:
                if heads.group == group:
                    shape = settings.num_places, len(heads.kv_heads)
                    self._heads[layer] = first, heads
                    self._chosen[layer] = torch.zeros(
                        *shape, budget_pages - ALWAYS_READ, dtype=torch.int32, device=arena.device
                    )
                    self._queries[layer] = torch.zeros(
                        *shape,
                        0 if similarity is None else group_size,
                        page.head_dim,
                        dtype=page.dtype,
                        device=arena.device,
                    )
                first += len(heads.kv_heads)

    def remembered(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Choices [num_places, heads, ...] of a layer, and queries that they were made for."""
        return self._chosen[layer], self._queries[layer]

    def choose(
        self, layer: int, query: torch.Tensor, order: torch.Tensor, plan: TritonPlan
    ) -> torch.Tensor:
        """Choose for the decodes of a step.

        Args:
            layer: Which layer's heads.
            query: [num_q_heads, total_tokens, head_dim] in the pages' dtype.
            order: int32 [num_kv_heads], of the layer.
            plan: The step.

        Returns:
            int32 [num_decodes, heads, budget_pages], blocks of the pages that each head of the
            group reads, in the order of their tokens; unwritten where all pages are read. Without
            heads if the layer has none in the group.
        """
        num_decodes = plan.shape.num_decodes
        if layer not in self._heads:
            return plan.choices.new_empty(num_decodes, 0, self.choosing.budget_pages)
        first_head, heads = self._heads[layer]
        out = plan.choices.new_empty(num_decodes, len(heads.kv_heads), self.choosing.budget_pages)
        select_pages(
            out,
            self._chosen[layer],
            self._queries[layer],
            query,
            self._region,
            order,
            plan.rows,
            plan.choices,
            plan.tables[self.choosing.group],
            plan.lists,
            first_head,
            heads.first_page,
            self._page.block_size,
            self._group_pages * self._page.page_bytes,
            self._page.page_bytes,
            self._page.bounds_at,
            self._max_spans,
            self._min_similarity,
        )
        return out


@torch.library.custom_op("headlong::select_pages", mutates_args={"out", "remembered", "queries"})
def select_pages(
    out: torch.Tensor,
    remembered: torch.Tensor,
    queries: torch.Tensor,
    query: torch.Tensor,
    region: torch.Tensor,
    order: torch.Tensor,
    rows: torch.Tensor,
    choices: torch.Tensor,
    tables: torch.Tensor,
    lists: torch.Tensor,
    first_head: int,
    first_page: int,
    block_size: int,
    block_bytes: int,
    page_bytes: int,
    bounds_at: int,
    max_spans: int,
    min_similarity: float,
) -> None:
    """Choose pages for the decodes of a step, in one layer.

    Args:
        out: int32 [num_decodes, num_heads, budget_pages], blocks of the pages to read.
        remembered: int32 [num_places, num_heads, budget_pages - 3], kept from step to step.
        queries: [num_places, num_heads, group_size, head_dim], likewise; or without rows if no
            similarity is asked for.
        query: [num_q_heads, total_tokens, head_dim] in the pages' dtype.
        region: The group's part of the arena, in the pages' dtype.
        order: int32 [num_kv_heads], of the layer.
        rows: int32 [num_seqs, 4].
        choices: int32 [num_seqs, 4].
        tables: int32 [num_seqs, 8], of the group.
        lists: int32 [...].
        first_head: Index in `order` of the first of the heads.
        first_page: Its page within a block.
        block_size: Tokens of a page.
        block_bytes: Bytes of a block.
        page_bytes: Bytes of a page.
        bounds_at: Byte of a page where its bounds begin.
        max_spans: Spans of the longest context.
        min_similarity: A head chooses anew below it; -inf is never.
    """
    num_decodes, num_heads, budget_pages = out.shape
    head_dim, group_size = query.shape[2], query.shape[0] // order.shape[0]
    anew = choices[:, 2:3].expand(-1, num_heads)
    if queries.shape[2]:
        anew = torch.empty(num_decodes, num_heads, dtype=torch.int32, device=query.device)
        drift_variant(query.dtype, head_dim).launch(
            (num_decodes, num_heads),
            anew,
            queries,
            query,
            order,
            rows,
            choices,
            num_heads,
            first_head,
            group_size,
            query.stride(0),
            query.stride(1),
            min_similarity,
        )
    looked_at = min(num_spans_looked_at(budget_pages), max_spans)
    most_keys = max(looked_at * SPAN_BLOCKS, max_spans)
    keys = torch.empty(num_decodes, num_heads, most_keys, dtype=torch.int32, device=query.device)
    listed = keys.new_empty(num_decodes, num_heads, looked_at)
    for spans in (True, False):
        if spans and max_spans == looked_at:
            continue
        score = score_variant(query.dtype, head_dim, spans=spans)
        tile = score.constants["PAGES"]
        assert isinstance(tile, int)
        num_keys = max_spans if spans else looked_at * SPAN_BLOCKS
        score.launch(
            (num_decodes, num_heads, -(-num_keys // tile)),
            keys,
            listed,
            query,
            region,
            order,
            rows,
            choices,
            anew,
            tables,
            lists,
            anew.stride(0),
            anew.stride(1),
            num_heads,
            first_head,
            first_page,
            group_size,
            query.stride(0),
            query.stride(1),
            block_size.bit_length() - 1,
            block_bytes // SECTION_ALIGNMENT_BYTES,
            page_bytes // SECTION_ALIGNMENT_BYTES,
            bounds_at // SECTION_ALIGNMENT_BYTES,
            most_keys,
            looked_at,
        )
        choose_variant(spans=spans).launch(
            (num_decodes, num_heads),
            out,
            remembered,
            listed,
            keys,
            rows,
            choices,
            anew,
            tables,
            lists,
            anew.stride(0),
            anew.stride(1),
            num_heads,
            block_size.bit_length() - 1,
            most_keys,
            looked_at,
            budget_pages,
            remembered.shape[2],
        )


@select_pages.register_fake
def _(*arguments: torch.Tensor | int | float) -> None:
    return None
