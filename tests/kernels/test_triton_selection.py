"""Decodes that choose their pages, on the GPU path, beside the reference."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from headlong.kernels.batch import UNBOUNDED
from headlong.kernels.layout import view_pages
from headlong.kernels.reference_selection import Choices
from support.selection import (
    Attend,
    LongCase,
    build_long_case,
    check_step,
    check_steps,
    selection,
    settings_for,
)
from support.triton import DEVICE, forget, place, plant, poisoned_memory, short_splits, triton_suite

if TYPE_CHECKING:
    from headlong.kernels.triton_attention import DecodeBuffer, TritonAttention

pytestmark = triton_suite

one_layer = partial(build_long_case, retrieval=((True, False, True),))
"""The interpreter takes its time."""

# Of two steps, of a span that has just begun, and one that the budget covers.
CONTEXTS = (700, 1033, 90)


def make_attention(
    case: LongCase,
    budget: int,
    package: str = "headlong.kernels",
    *,
    min_similarity: float | None = None,
    max_context: int = 1 << 12,
) -> "TritonAttention":
    module = importlib.import_module(f"{package}.triton_attention")
    attention: TritonAttention = module.TritonAttention(
        case.arena.to(DEVICE, copy=True),
        case.layout,
        case.num_q_heads,
        settings_for(budget, min_similarity=min_similarity, max_context=max_context),
    )
    return attention


def attends(attention: "TritonAttention", buffer: "DecodeBuffer | None" = None) -> Attend:
    """Attention of a case on memory that begins as NaN; through a buffer, padded by two."""

    def attend(case: LongCase, layer: int) -> torch.Tensor:
        count = len(case.sequences)
        with poisoned_memory():
            if buffer is None:
                plan = attention.plan(case.batch)
            else:
                assert buffer.take(case.batch, count + 2)
                plan = buffer.plan(count + 2)
            query = case.query[layer]
            if buffer is not None:
                query = torch.cat([query, query.new_zeros(query.shape[0], 2, query.shape[2])], 1)
            plan.partial.fill_(torch.nan)
            plan.lse.fill_(torch.nan)
            out = attention.attend(layer, place(query), plan, sm_scale=case.head_dim**-0.5)
        return out[: int(case.batch.cu_seqlens_q[-1])].cpu()

    return attend


@pytest.mark.parametrize(
    ("dtype", "quantisation"),
    [
        (torch.float32, None),
        (torch.float16, "int8"),
        (torch.bfloat16, None),
        (torch.bfloat16, "int4"),
        (torch.float16, "fp8"),
    ],
)
def test_attends_over_the_pages_that_the_reference_chooses(
    dtype: torch.dtype, quantisation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_splits(monkeypatch)
    case = one_layer(CONTEXTS, [64, 96, 96], dtype=dtype, quantisation=quantisation)
    check_step(case, attends(make_attention(case, 96)))


def test_budgets_group_sizes_and_odd_heads() -> None:
    contexts = [16 * pages + 3 for pages in (130, 70, 12)]
    budgets = [16 * pages for pages in (9, 20, 14)]
    case = build_long_case(contexts, budgets, block_size=16, group_size=3, head_dim=80)
    check_step(case, attends(make_attention(case, 20 * 16)))


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_the_edge_of_a_block_and_of_a_budget(offset: int) -> None:
    case = one_layer([12 * 8 + offset, 128 * 8 + offset], [96] * 2)
    check_step(case, attends(make_attention(case, 96)))


def test_dense_sequences_and_chunks_beside_choices() -> None:
    case = one_layer([300, 700, 400], [UNBOUNDED, 96, 96], num_new=[1, 5, 1])
    check_step(case, attends(make_attention(case, 96)))


def test_a_budget_that_covers_the_context_changes_nothing() -> None:
    case = one_layer([300, 77], [512] * 2)
    dense = replace(case, batch=replace(case.batch, selection=None))
    attend = attends(make_attention(case, 512))
    assert torch.equal(attend(case, 0), attend(dense, 0))


def test_results_do_not_depend_on_batch_mates() -> None:
    case = one_layer([1200, 300, 90], [96, 64, 96])
    attend = attends(make_attention(case, 96))
    together = attend(case, 0)
    for seq in range(3):
        assert torch.equal(attend(case.only(seq), 0)[0], together[seq])


def test_choices_are_kept_and_renewed() -> None:
    case = one_layer([1100, 300], [96] * 2)
    check_steps(case, attends(make_attention(case, 96)))


def test_a_kept_choice_moves_with_the_newest_pages() -> None:
    case = one_layer([1504], [96])
    attention, choices = make_attention(case, 96), Choices()
    check_step(case, attends(attention), choices)
    case.grow()
    attention.arena.copy_(case.arena)
    case.batch = replace(case.batch, selection=selection([96], [False]))
    check_step(case, attends(attention), choices)


def test_heads_whose_queries_moved_choose_anew() -> None:
    case = one_layer([1100, 300, 90], [96] * 3)
    attention, choices = make_attention(case, 96, min_similarity=0.9), Choices(0.9)
    anew = []
    for renews in ([True] * 3, [False] * 3, [False, True, False], [False] * 3):
        case.batch = replace(case.batch, selection=selection([96] * 3, renews))
        before = dict(choices.pages)
        check_step(case, attends(attention), choices)
        anew.append(sum(choices.pages[key] != before.get(key) for key in choices.pages))
        case.draw_queries(like_before=2.0)
    assert len(choices.pages) == anew[0]
    assert 0 < anew[1] < anew[0]


def test_through_a_buffer_with_padding() -> None:
    from headlong.kernels.triton_attention import DecodeBuffer

    case = one_layer([1100, 90], [96] * 2)
    attention = make_attention(case, 96)
    buffer = DecodeBuffer(attention, 8)
    buffer.clear(4)
    check_steps(case, attends(attention, buffer))


def test_padding_leaves_every_choice_alone() -> None:
    from headlong.kernels.triton_attention import DecodeBuffer

    case = one_layer([1500], [96])
    attention = make_attention(case, 96, min_similarity=0.5)
    buffer = DecodeBuffer(attention, 4)
    attend = attends(attention, buffer)
    attend(case, 0)
    assert attention.page_selection is not None
    memory = attention.page_selection.remembered(0)
    before = [each.clone() for each in memory]
    assert before[0].any()
    buffer.clear(4)
    plan = buffer.plan(4)
    query = torch.ones(case.num_q_heads, 4, case.head_dim, device=DEVICE)
    attention.attend(0, query, plan, sm_scale=1.0)
    assert all(map(torch.equal, before, memory))


def test_splits_follow_from_the_budget() -> None:
    case = one_layer([3000, 600], [96, 96])
    longer = one_layer([200, 200], [96, 96])
    packed = make_attention(case, 96).pack(case.batch)
    shorter = make_attention(longer, 96).pack(longer.batch)
    assert packed.num_splits[0] == shorter.num_splits[0] == 2
    assert packed.shape.chooses


def test_equals_go_to_the_lower_page() -> None:
    case = build_long_case([1500], [96])
    bounds = view_pages(case.layout, case.arena, 0).bounds
    assert bounds is not None
    bounds[..., 0, :], bounds[..., 1, :] = -0.0, 0.0
    bounds[..., 2, :], bounds[..., 3, :] = 0.0, -0.0
    blocks = choose(case)
    table = case.batch.groups[0].block_tables[0].tolist()
    for head in blocks[0].tolist():
        assert [table.index(block) for block in head] == [*range(10), 186, 187]


def test_what_is_no_number_stays_inside_the_table() -> None:
    case = build_long_case([1500, 300], [96, 96])
    case.query[1][:, 0] = torch.nan
    blocks = choose(case)
    for head in blocks[0].tolist():
        assert len(set(head)) == 12
        assert set(head) <= set(case.batch.groups[0].block_tables[0].tolist())
    check_step(case.only(1), attends(make_attention(case, 96)))


def choose(case: LongCase) -> torch.Tensor:
    """Blocks that the heads of layer 1 read, [num_seqs, heads, pages]."""
    attention = make_attention(case, 96)
    assert attention.page_selection is not None
    order = torch.arange(3, dtype=torch.int32, device=DEVICE)
    plan = attention.plan(case.batch)
    return attention.page_selection.choose(1, place(case.query[1]), order, plan).cpu()


def test_a_budget_over_the_backend_s_is_refused() -> None:
    case = one_layer([1500], [128])
    attention = make_attention(case, 96)
    with pytest.raises(ValueError, match="budgets must be at most 12 pages, got 16"):
        attention.plan(case.batch)


def test_traces_and_keeps_its_promises() -> None:
    from headlong.kernels.triton_selection import select_pages

    case = build_long_case([300], [96])
    attention = make_attention(case, 96, min_similarity=0.5)
    assert attention.page_selection is not None
    plan = attention.plan(case.batch)
    recorded: list[tuple[object, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "headlong.kernels.triton_selection.select_pages", lambda *each: recorded.append(each)
        )
        order = torch.arange(3, dtype=torch.int32, device=DEVICE)
        attention.page_selection.choose(1, place(case.query[1]), order, plan)
    torch.library.opcheck(select_pages, recorded[0], test_utils=("test_schema", "test_faketensor"))


MUTANTS = {
    "least and greatest exchanged": (
        "triton_choice",
        "tl.maximum(query * least, query * greatest)",
        "tl.minimum(query * least, query * greatest)",
    ),
    "the newest page missing": (
        "triton_choice",
        "num_pages - FIRST - NEWEST + index)",
        "num_pages - FIRST - NEWEST - 1 + index)",
    ),
    "the first page of a span for the span": (
        "triton_choice",
        "pages = tl.minimum((index + 1) * SPAN, num_pages) - 1",
        "pages = index * SPAN",
    ),
    "spans by the bounds of a page": (
        "triton_choice",
        "bounds_ptr += 2 * HEAD_DIM",
        "bounds_ptr += 0",
    ),
    "pages of a wrong span": (
        "triton_choice",
        "listed + spans, mask=spans < looked_at",
        "listed + spans // 2, mask=spans < looked_at",
    ),
    "one query head for all": (
        "triton_choice",
        "best = tl.maximum(best, tl.sum(",
        "best = tl.minimum(float('inf'), tl.sum(",
    ),
    "the table of another head": (
        "triton_decode",
        "(seq * num_heads + head).to(tl.int64) * chosen_pages",
        "(seq * num_heads).to(tl.int64) * chosen_pages",
    ),
    "the choice of another head": (
        "triton_choice",
        "remembered_ptr += (place * num_heads + head) *",
        "remembered_ptr += place * num_heads *",
    ),
    "the place of another sequence": (
        "triton_choice",
        "remembered_ptr += (place * num_heads + head) *",
        "remembered_ptr += (0 * place + head) *",
    ),
    "a choice is always renewed": (
        "triton_budget",
        "choices[:, 2] = batch.selection.renews.numpy()[order]",
        "choices[:, 2] = 1",
    ),
    "what is chosen is not remembered": (
        "triton_choice",
        "tl.store(remembered_ptr + at, pages, mask=taken)",
        "tl.store(remembered_ptr + at, pages + 1, mask=taken)",
    ),
    "the pages of the lowest scores": (
        "triton_choice",
        "keys = tl.where(scored, ordered_key(best), LEFT_OUT)",
        "keys = tl.where(scored, -ordered_key(best), LEFT_OUT)",
    ),
    "the newest page hidden": (
        "triton_decode",
        "context -= (num_pages - read_pages) << block_shift",
        "context -= (num_pages - read_pages + 1) << block_shift",
    ),
}


@pytest.fixture
def planted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, str, str], Attend]]:
    name = "mutant_choosing_kernels"

    def make(module: str, right: str, wrong: str) -> Attend:
        plant(tmp_path, name, module, right, wrong)
        short_splits(monkeypatch, name)
        made: list[Attend] = []

        def attend_mutant(case: LongCase, layer: int) -> torch.Tensor:
            if not made:
                made.append(attends(make_attention(case, 96, name)))
            return made[0](case, layer)

        return attend_mutant

    yield make
    forget(name)


def mutant_case() -> LongCase:
    return one_layer([1500, 300], [96] * 2)


def test_the_original_passes(planted: Callable[[str, str, str], Attend]) -> None:
    line = "choices[:, 2] = batch.selection.renews.numpy()[order]"
    check_steps(mutant_case(), planted("triton_budget", line, line))


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_a_mutant_is_caught(
    mutant: tuple[str, str, str], planted: Callable[[str, str, str], Attend]
) -> None:
    attend_mutant = planted(*mutant)
    with pytest.raises(AssertionError, match="off the reference by"):
        check_steps(mutant_case(), attend_mutant)
