"""Which pages a retrieval head reads for a generated token.

After Quest (arXiv 2406.10774) and LServe (arXiv 2502.14866).
A head reads the first page, the two newest, and of the others those that its query may fit best: no
key of a page has a larger product with the query than

    sum_d max(q_d * least_d, q_d * greatest_d)

Pages are looked at in two steps, spans of `SPAN_BLOCKS` pages first, so that a choice takes less
than a reading.
"""

from dataclasses import dataclass, field

import torch

from headlong.kernels.batch import UNBOUNDED, AttentionBatch
from headlong.kernels.layout import SPAN_BLOCKS
from headlong.kernels.reference_pages import SequencePages

NEWEST_PAGES = 2
"""Pages at the end of a context that are always read."""

FIRST_PAGES = 1
"""Pages at its beginning that are always read."""

FEWEST_SPANS = 4
SPAN_FACTOR = 4
"""Spans looked at are enough for so many times the pages that are read."""


@dataclass
class Choices:
    """What was chosen, for later tokens of the same sequences.

    Attributes:
        pages: By place, layer and KV head, the chosen pages without the newest, ascending.
        queries: Likewise, [group_size, head_dim], what they were chosen for.
        min_similarity: See `SelectionSettings`.
    """

    min_similarity: float | None = None
    pages: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)
    queries: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)


def num_spans_looked_at(budget_pages: int) -> int:
    """Most spans whose pages are scored one by one."""
    return max(FEWEST_SPANS, -(-SPAN_FACTOR * budget_pages // SPAN_BLOCKS))


def chosen_pages(
    pages: SequencePages,
    query: torch.Tensor,
    batch: AttentionBatch,
    seq: int,
    head: tuple[int, int],
    choices: Choices | None,
) -> list[int] | None:
    """The pages that a KV head reads.

    Args:
        pages: The sequence's pages.
        query: float64 [num_new, group_size, head_dim], the queries of the KV head.
        batch: The batch, with what each sequence may read.
        seq: Which sequence.
        head: Layer and KV head.
        choices: What was chosen before; changed. None if nothing is remembered.

    Returns:
        Logical indices, ascending; None for all.
    """
    if batch.selection is None or pages.views.bounds is None or len(query) != 1:
        return None
    budget = int(batch.selection.budgets[seq])
    num_pages = -(-int(batch.context_lens[seq]) // pages.block_size)
    budget_pages = budget // pages.block_size
    if budget == UNBOUNDED or num_pages <= budget_pages:
        return None
    remembered = (int(batch.selection.places[seq]), *head)
    if (
        choices is None
        or bool(batch.selection.renews[seq])
        or remembered not in choices.pages
        or _has_drifted(choices, remembered, query[0])
    ):
        chosen = choose(pages, query[0], num_pages, budget_pages)
        if choices is not None:
            choices.pages[remembered], choices.queries[remembered] = chosen, query[0]
    else:
        chosen = choices.pages[remembered]
    newest = range(num_pages - NEWEST_PAGES, num_pages)
    return sorted({*chosen, *newest})


def choose(
    pages: SequencePages, query: torch.Tensor, num_pages: int, budget_pages: int
) -> list[int]:
    """Choose pages for a query, the newest aside.

    Args:
        pages: The sequence's pages.
        query: float64 [group_size, head_dim].
        num_pages: Pages of the context.
        budget_pages: Pages to read, fewer than there are.

    Returns:
        Logical indices, ascending.
    """
    num_spans = -(-num_pages // SPAN_BLOCKS)
    spans = list(range(num_spans))
    wanted = num_spans_looked_at(budget_pages)
    if num_spans > wanted:
        last = [min((span + 1) * SPAN_BLOCKS, num_pages) - 1 for span in spans]
        spans = _best(spans, [page_score(pages, query, page, 2) for page in last], wanted)
    candidates = [
        page
        for span in sorted(spans)
        for page in range(span * SPAN_BLOCKS, (span + 1) * SPAN_BLOCKS)
        if FIRST_PAGES <= page < num_pages - NEWEST_PAGES
    ]
    scores = [page_score(pages, query, page, 0) for page in candidates]
    best = _best(candidates, scores, budget_pages - FIRST_PAGES - NEWEST_PAGES)
    return sorted([*range(FIRST_PAGES), *best])


def page_score(pages: SequencePages, query: torch.Tensor, logical: int, bound: int) -> float:
    """Most that any key may have as product with any query head.

    Args:
        pages: The sequence's pages.
        query: float64 [group_size, head_dim].
        logical: Logical index of the page.
        bound: 0 for the page, 2 for its span up to and with it.
    """
    assert pages.views.bounds is not None
    bounds = pages.views.bounds[pages.block(logical), pages.page].double()
    products = torch.maximum(query * bounds[bound], query * bounds[bound + 1])
    return float(products.sum(-1).max())


def _best(candidates: list[int], scores: list[float], count: int) -> list[int]:
    """The `count` candidates of the highest scores; of equals the lower ones."""
    ranked = sorted(zip(candidates, scores, strict=True), key=lambda each: (-each[1], each[0]))
    return [candidate for candidate, _ in ranked[:count]]


def _has_drifted(choices: Choices, remembered: tuple[int, int, int], query: torch.Tensor) -> bool:
    if choices.min_similarity is None:
        return False
    before = choices.queries[remembered]
    similarity = torch.nn.functional.cosine_similarity(query, before, dim=-1)
    return bool((similarity < choices.min_similarity).any())
