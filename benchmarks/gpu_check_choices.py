"""The pages that heads chose on the device, beside the reference's scores.

The device sums scores in float32, so of two that are nearly equal it may take either. It looks at
spans first, and there too: a page counts as one that could be chosen if its span may have been
among those looked at, and as one that should be if it must have been.
"""

from dataclasses import dataclass

import gpu_checkout  # noqa: F401
import torch

from headlong.kernels.batch import UNBOUNDED, AttentionBatch
from headlong.kernels.layout import SPAN_BLOCKS, ArenaLayout
from headlong.kernels.reference_pages import SequencePages
from headlong.kernels.reference_selection import (
    FIRST_PAGES,
    NEWEST_PAGES,
    Choices,
    num_spans_looked_at,
    page_score,
)

NEAR = 1e-4
"""Scores of about 10 to 100 that are no further apart are a tie."""


@dataclass(frozen=True, slots=True)
class Chooser:
    """A head of a sequence that chooses.

    Attributes:
        seq: Index in the batch.
        place: Where its choice is remembered.
        kv_head: Head of the layer.
        num_pages: Pages of the context.
        budget_pages: Pages that it reads.
    """

    seq: int
    place: int
    kv_head: int
    num_pages: int
    budget_pages: int

    @property
    def count(self) -> int:
        """Pages that it chooses, those that are always read left out."""
        return self.budget_pages - FIRST_PAGES - NEWEST_PAGES


def kept_choices(
    remembered: torch.Tensor, layout: ArenaLayout, layer: int, batch: AttentionBatch
) -> Choices:
    """The device's memory as the reference's.

    Args:
        remembered: int32 [num_places, heads, ...], of the layer.
        layout: The arena's map.
        layer: Which.
        batch: Who chose.
    """
    kept = Choices()
    heads = _choosing_heads(layout, layer)
    for each in _choosers(layout, layer, batch):
        own = remembered[each.place, heads.index(each.kv_head), : each.count].tolist()
        kept.pages[each.place, layer, each.kv_head] = [*range(FIRST_PAGES), *own]
    return kept


def check_choices(
    kept: Choices,
    query: torch.Tensor,
    arena: torch.Tensor,
    layout: ArenaLayout,
    layer: int,
    batch: AttentionBatch,
) -> list[str]:
    """What is wrong with choices.

    Args:
        kept: What was chosen.
        query: [total_tokens, num_q_heads, head_dim], what for.
        arena: uint8 [total_bytes], on the CPU.
        layout: Its map.
        layer: Which.
        batch: Who chose.
    """
    problems: list[str] = []
    num_kv_heads = sum(len(heads.kv_heads) for heads in layout.layers[layer])
    group_size = query.shape[1] // num_kv_heads
    for each in _choosers(layout, layer, batch):
        group, page = layout.head_page(layer, each.kv_head)
        pages = SequencePages(arena, layout, batch, group, page, each.seq)
        row = int(batch.cu_seqlens_q[each.seq])
        first = each.kv_head * group_size
        mine = query[row, first : first + group_size].double()
        chosen = kept.pages[each.place, layer, each.kv_head][FIRST_PAGES:]
        if not _could_be_chosen(pages, mine, each, chosen):
            problems.append(f"sequence {each.seq}, head {each.kv_head}: other pages are better")
    return problems


def _could_be_chosen(
    pages: SequencePages, query: torch.Tensor, chooser: Chooser, chosen: list[int]
) -> bool:
    must, may = _spans(pages, query, chooser)
    middle = range(FIRST_PAGES, chooser.num_pages - NEWEST_PAGES)
    scores = {
        page: page_score(pages, query, page, 0) for page in middle if page // SPAN_BLOCKS in may
    }
    if chosen != sorted(set(chosen)) or len(chosen) != chooser.count or set(chosen) - set(scores):
        return False
    worst = min(scores[page] for page in chosen)
    left_out = [
        score
        for page, score in scores.items()
        if page // SPAN_BLOCKS in must and page not in chosen
    ]
    return max(left_out, default=worst) <= worst + NEAR


def _spans(
    pages: SequencePages, query: torch.Tensor, chooser: Chooser
) -> tuple[set[int], set[int]]:
    """Spans that must be looked at, and all that may be."""
    num_spans = -(-chooser.num_pages // SPAN_BLOCKS)
    wanted = num_spans_looked_at(chooser.budget_pages)
    if num_spans <= wanted:
        return set(range(num_spans)), set(range(num_spans))
    last = [min((span + 1) * SPAN_BLOCKS, chooser.num_pages) - 1 for span in range(num_spans)]
    scores = [page_score(pages, query, page, 2) for page in last]
    ranked = sorted(scores, reverse=True)
    least, next_one = ranked[wanted - 1], ranked[wanted]
    return (
        {span for span, score in enumerate(scores) if score > next_one + NEAR},
        {span for span, score in enumerate(scores) if score >= least - NEAR},
    )


def _choosing_heads(layout: ArenaLayout, layer: int) -> list[int]:
    """Heads of the layer whose pages have bounds, as the device numbers them."""
    return [
        head
        for heads in layout.layers[layer]
        if layout.pages[heads.group].summarised
        for head in heads.kv_heads
    ]


def _choosers(layout: ArenaLayout, layer: int, batch: AttentionBatch) -> list[Chooser]:
    """Who chose, of a batch with budgets."""
    assert batch.selection is not None
    block_size = layout.pages[0].block_size
    found: list[Chooser] = []
    for seq, context in enumerate(batch.context_lens.tolist()):
        budget = int(batch.selection.budgets[seq])
        num_pages, budget_pages = -(-context // block_size), budget // block_size
        if budget != UNBOUNDED and num_pages > budget_pages:
            place = int(batch.selection.places[seq])
            found += [
                Chooser(seq, place, head, num_pages, budget_pages)
                for head in _choosing_heads(layout, layer)
            ]
    return found
