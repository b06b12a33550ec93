"""Decodes that choose their pages, on the PyTorch path, beside the reference."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headlong.kernels.batch import UNBOUNDED
from headlong.kernels.layout import SPAN_BLOCKS, view_pages
from headlong.kernels.reference_pages import SequencePages
from headlong.kernels.reference_selection import Choices, num_spans_looked_at, page_score
from headlong.kernels.reference_summaries import summarise
from headlong.kernels.torch_attention import TorchAttention
from support.compare import TOLERANCES, relative_error
from support.selection import (
    Attend,
    LongCase,
    build_long_case,
    check_step,
    check_steps,
    expected,
    plant_torch,
    selection,
    settings_for,
)
from support.triton import forget

# Of one page, of two steps, of a span that has just begun, and one that the budget covers.
CONTEXTS = (1500, 300, 2300, 2057, 90)


def attend(case: LongCase, layer: int, attention: TorchAttention) -> torch.Tensor:
    return attention.attend(
        layer, case.query[layer], attention.plan(case.batch), sm_scale=case.head_dim**-0.5
    )


def make_attention(case: LongCase, budget: int, **changes: float | None) -> TorchAttention:
    return TorchAttention(
        case.arena, case.layout, case.num_q_heads, replace(settings_for(budget), **changes)
    )


def check(case: LongCase, attention: TorchAttention, choices: Choices | None = None) -> None:
    check_step(case, partial(attend, attention=attention), choices)


def test_the_bounds_of_these_tests_are_the_reference_s() -> None:
    case = build_long_case([300], [UNBOUNDED], block_size=8)
    arena = case.arena.clone()
    bounds = view_pages(case.layout, arena, 0).bounds
    assert bounds is not None
    bounds.fill_(torch.nan)
    for page in range(case.layout.group_pages[0]):
        summarise(SequencePages(arena, case.layout, case.batch, 0, page, 0), 300, 300)
    written = view_pages(case.layout, case.arena, 0).bounds
    assert written is not None
    blocks = case.batch.groups[0].block_tables[0].long()
    assert len(blocks) > SPAN_BLOCKS
    assert torch.equal(bounds[blocks], written[blocks])


@pytest.mark.parametrize("quantisation", [None, "int8", "fp8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attends_over_the_pages_that_the_reference_chooses(
    dtype: torch.dtype, quantisation: str | None
) -> None:
    case = build_long_case(CONTEXTS, [96] * 5, dtype=dtype, quantisation=quantisation)
    check(case, make_attention(case, 96))


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_budgets_and_block_sizes(block_size: int, group_size: int) -> None:
    contexts = [block_size * pages + 3 for pages in (200, 130, 40, 12)]
    budgets = [block_size * pages for pages in (9, 40, 8, 14)]
    case = build_long_case(
        contexts, budgets, block_size=block_size, group_size=group_size, head_dim=8
    )
    check(case, make_attention(case, max(budgets), max_context=max(contexts)))


@pytest.mark.parametrize("offset", range(-1, 3))
def test_the_edge_of_a_block_and_of_a_budget(offset: int) -> None:
    case = build_long_case([12 * 8 + offset, 128 * 8 + offset, 161 * 8 + offset], [96] * 3)
    check(case, make_attention(case, 96))


def test_a_budget_that_covers_the_context_changes_nothing() -> None:
    case = build_long_case([300, 512, 77], [512] * 3)
    dense = replace(case, batch=replace(case.batch, selection=None))
    attention = make_attention(case, 512)
    for layer in range(len(case.layout.layers)):
        assert torch.equal(attend(case, layer, attention), attend(dense, layer, attention))


def test_unbounded_sequences_are_dense_beside_others() -> None:
    case = build_long_case([1500, 1500], [UNBOUNDED, 96])
    check(case, make_attention(case, 96))


def test_results_do_not_depend_on_batch_mates() -> None:
    case = build_long_case(CONTEXTS, [96, 96, 96, 64, 96])
    attention = make_attention(case, 96)
    together = attend(case, 1, attention)
    for seq in range(len(CONTEXTS)):
        alone = attend(case.only(seq), 1, attention)
        assert relative_error(together[seq : seq + 1], alone.double()) <= TOLERANCES[torch.float32]


@given(
    contexts=st.lists(st.integers(1, 3000), min_size=1, max_size=3),
    budget_pages=st.integers(4, 40),
    block_size=st.sampled_from([8, 16]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_no_page_that_was_left_out_is_worth_more(
    contexts: list[int], budget_pages: int, block_size: int, seed: int
) -> None:
    budget = budget_pages * block_size
    assume(max(contexts) > budget)
    case = build_long_case(
        contexts, [budget] * len(contexts), block_size=block_size, head_dim=8, seed=seed
    )
    attention = make_attention(case, budget)
    for layer, members in enumerate(case.layout.layers):
        read = blocks_read(case, attention, layer)
        for seq, context in enumerate(contexts):
            num_pages = -(-context // block_size)
            if num_pages <= budget_pages:
                assert seq not in read
                continue
            for index, kv_head in enumerate(members[0].kv_heads):
                check_choice(case, layer, seq, kv_head, read[seq][index], num_pages, budget_pages)


def blocks_read(
    case: LongCase, attention: TorchAttention, layer: int
) -> dict[int, list[list[int]]]:
    """Of each sequence that chose, the blocks that each head reads."""
    heads = case.layout.layers[layer][0]
    (plan, _) = attention.plan(case.batch)
    assert attention.page_selection is not None
    found: dict[int, list[list[int]]] = {}
    for bucket in plan.choices:
        grouped = case.query[layer].unflatten(0, (-1, case.group_size))[list(heads.kv_heads)]
        rows = grouped[:, :, bucket.rows].permute(2, 0, 1, 3)
        blocks = attention.page_selection.choose(layer, heads, rows, bucket)
        found |= dict(zip(bucket.rows.tolist(), blocks.tolist(), strict=True))
    return found


def check_choice(
    case: LongCase,
    layer: int,
    seq: int,
    kv_head: int,
    blocks: Sequence[int],
    num_pages: int,
    budget_pages: int,
) -> None:
    """Up to rounding, what is read is worth more than the rest of what was looked at."""
    _, page = case.layout.head_page(layer, kv_head)
    pages = SequencePages(case.arena, case.layout, case.batch, 0, page, seq)
    logical = {pages.block(index): index for index in range(num_pages)}
    read = [logical[block] for block in blocks]
    assert read == sorted(set(read))
    assert len(read) == budget_pages
    assert {0, num_pages - 2, num_pages - 1} <= set(read)
    query = case.query[layer][kv_head * case.group_size :][: case.group_size, seq].double()
    slack = 1e-5 * float(query.norm())

    spans = range(-(-num_pages // SPAN_BLOCKS))
    last = [min((span + 1) * SPAN_BLOCKS, num_pages) - 1 for span in spans]
    worth = [page_score(pages, query, index, 2) for index in last]
    looked_at = num_spans_looked_at(budget_pages)
    least = sorted(worth)[-min(looked_at, len(worth))]
    scores = {index: page_score(pages, query, index, 0) for index in range(num_pages)}
    chosen = read[1:-2]
    assert all(worth[index // SPAN_BLOCKS] >= least - slack for index in chosen)
    left_out = [
        scores[index]
        for index in range(1, num_pages - 2)
        if index not in chosen and worth[index // SPAN_BLOCKS] > least + slack
    ]
    assert min(scores[index] for index in chosen) >= max(left_out, default=-torch.inf) - slack


def test_a_choice_is_kept_until_it_is_to_be_renewed() -> None:
    case = build_long_case([1500, 700], [96, 96])
    attention, choices = make_attention(case, 96), Choices()
    check(case, attention, choices)
    case.draw_queries()
    case.batch = replace(case.batch, selection=selection([96, 96], [False, True]))
    check(case, attention, choices)
    other = expected(case, 1)
    kept = attend(case, 1, attention)
    assert relative_error(kept[0], other[0]) > 0.01
    assert relative_error(kept[1], other[1]) <= TOLERANCES[torch.float32]


def test_a_kept_choice_moves_with_the_newest_pages() -> None:
    """A choice made in one block, used in the next: the page that slid is read only if chosen."""
    case = build_long_case([1504], [96])
    attention, choices = make_attention(case, 96), Choices()
    check(case, attention, choices)
    case.grow()
    case.batch = replace(case.batch, selection=selection([96], [False]))
    check(case, attention, choices)


def test_places_do_not_share_choices() -> None:
    case = build_long_case([1500, 1500], [96, 96])
    attention, choices = make_attention(case, 96), Choices()
    check(case, attention, choices)
    case.draw_queries()
    case.batch = replace(case.batch, selection=selection([96, 96], [True, False]))
    check(case, attention, choices)
    case.draw_queries()
    case.batch = replace(case.batch, selection=selection([96, 96], [False, False]))
    check(case, attention, choices)


@pytest.mark.parametrize("min_similarity", [-1.0, 0.0, 0.3, 0.99])
def test_heads_whose_queries_moved_choose_anew(min_similarity: float) -> None:
    case = build_long_case([1500, 700, 90], [96] * 3, group_size=1)
    attention = make_attention(case, 96, min_similarity=min_similarity)
    choices = Choices(min_similarity)
    check(case, attention, choices)
    for step in range(3):
        case.draw_queries(like_before=2.0)
        case.batch = replace(case.batch, selection=selection([96] * 3, [False, step == 1, False]))
        check(case, attention, choices)


def test_prefill_chunks_read_all_beside_choices() -> None:
    case = build_long_case([1500, 700], [96, 96], num_new=[1, 5])
    check(case, make_attention(case, 96))


def test_equals_go_to_the_lower_page() -> None:
    case = build_long_case([1500], [96])
    bounds = view_pages(case.layout, case.arena, 0).bounds
    assert bounds is not None
    bounds[..., 0, :], bounds[..., 1, :] = -0.0, 0.0
    bounds[..., 2, :], bounds[..., 3, :] = 0.0, -0.0
    attention = make_attention(case, 96)
    (blocks,) = blocks_read(case, attention, 1)[0][:1]
    table = case.batch.groups[0].block_tables[0].tolist()
    assert [table.index(block) for block in blocks] == [*range(10), 186, 187]


def test_what_is_no_number_stays_inside_the_table() -> None:
    case = build_long_case([1500, 300], [96, 96])
    case.query[1][:, 0] = torch.nan
    attention = make_attention(case, 96)
    for blocks in blocks_read(case, attention, 1)[0]:
        assert len(set(blocks)) == 12
        assert set(blocks) <= set(case.batch.groups[0].block_tables[0].tolist())
    got, want = attend(case, 1, attention), expected(case, 1)
    assert relative_error(got[1], want[1]) <= TOLERANCES[torch.float32]


def test_a_budget_without_a_choice_is_refused() -> None:
    case = build_long_case([100], [UNBOUNDED])
    with pytest.raises(ValueError, match="budget_tokens must be over 3 pages of 8 tokens, got 31"):
        make_attention(case, 31)
    make_attention(case, 32)


MUTANTS = {
    "least and greatest exchanged": (
        "torch_selection",
        "torch.cat([query.clamp(max=0), query.clamp(min=0)], dim=-1)",
        "torch.cat([query.clamp(min=0), query.clamp(max=0)], dim=-1)",
    ),
    "the newest page is the one before": (
        "torch_selection",
        "torch.arange(-NEWEST_PAGES, 0, device",
        "torch.arange(-NEWEST_PAGES - 1, -1, device",
    ),
    "the first page of a span for the span": (
        "torch_selection",
        "last = torch.minimum((spans + 1) * SPAN_BLOCKS, num_pages) - 1",
        "last = spans * SPAN_BLOCKS",
    ),
    "spans by the bounds of a page": (
        "torch_selection",
        "group.bounds[:, 2:] if spans",
        "group.bounds[:, :2] if spans",
    ),
    "pages by the bounds of their spans": (
        "torch_selection",
        "else group.bounds[:, :2]",
        "else group.bounds[:, 2:]",
    ),
    "one query head for all": ("torch_selection", "products.amax(1)", "products[:, 0]"),
    "all heads read what the first chose": (
        "torch_selection",
        "chosen = remembered[bucket.places, :, :count].long()",
        "chosen = remembered[bucket.places, :1, :count].long().expand(query.shape[0], "
        "query.shape[1], -1)",
    ),
    "all sequences read what the first chose": (
        "torch_selection",
        "remembered[bucket.places, :, :count].long()",
        "remembered[bucket.places[:1].expand(len(query)), :, :count].long()",
    ),
    "a choice is never renewed": (
        "torch_selection",
        "        if len(renewing):",
        "        if len(renewing) and not remembered[bucket.places].any():",
    ),
    "a choice is never kept": (
        "torch_selection",
        "renewing=batch.selection.renews[index].nonzero().view(-1)",
        "renewing=torch.arange(len(index))",
    ),
    "a page too few": (
        "torch_selection",
        "SPAN_BLOCKS + offsets",
        "SPAN_BLOCKS + offsets // 2 * 2",
    ),
    "what the newest page does not hold yet": (
        "torch_selection",
        "hidden=HiddenKeys.where(keys >= seen[:, None], device)",
        "hidden=HiddenKeys.where(keys > seen[:, None], device)",
    ),
    "blocks of another sequence": (
        "torch_selection",
        "return tables[seqs, pages].long()",
        "return tables[0 * seqs, pages].long()",
    ),
}


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Callable[[str, str, str], Attend]]:
    name = "mutant_torch_kernels"

    def make(module: str, right: str, wrong: str) -> Attend:
        package = plant_torch(tmp_path, name, module, right, wrong)
        made: list[TorchAttention] = []

        def attend_mutant(case: LongCase, layer: int) -> torch.Tensor:
            if not made:
                kernels = importlib.import_module(f"{package}.torch_attention")
                made.append(
                    kernels.TorchAttention(
                        case.arena, case.layout, case.num_q_heads, settings_for(96)
                    )
                )
            return attend(case, layer, made[0])

        return attend_mutant

    yield make
    forget(name)


def mutant_case() -> LongCase:
    return build_long_case([1500, 2300, 700], [96] * 3)


def test_the_original_passes(planted: Callable[[str, str, str], Attend]) -> None:
    line = "return tables[seqs, pages].long()"
    check_steps(mutant_case(), planted("torch_selection", line, line))


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_a_mutant_is_caught(
    mutant: tuple[str, str, str], planted: Callable[[str, str, str], Attend]
) -> None:
    attend_mutant = planted(*mutant)
    with pytest.raises(AssertionError, match="off the reference by"):
        check_steps(mutant_case(), attend_mutant)
