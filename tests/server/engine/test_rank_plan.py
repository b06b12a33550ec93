"""Arenas of several ranks: the same blocks, each rank's own heads, none over its budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headlong.cache.cache_shape import CacheShape
from headlong.cache.capacity import CapacityError, plan_memory
from headlong.cache.groups import build_head_groups
from headlong.cache.policy import HeadPolicy
from headlong.server.engine.head_dealing import HeadShare, deal_heads
from headlong.server.engine.rank_plan import local_arena, plan_ranks

MAX_MODEL_LEN = 4096


def shape_of(labels: list[list[bool]], windows: list[int | None]) -> CacheShape:
    return CacheShape(
        groups=build_head_groups(labels, HeadPolicy(4, 60), windows),
        head_dim=8,
        dtype=torch.float32,
        block_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=64,
    )


@st.composite
def models(draw: st.DrawFn) -> tuple[list[list[bool]], list[int | None], int]:
    num_ranks, per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    heads = num_ranks * per_rank
    labels = draw(
        st.lists(st.lists(st.booleans(), min_size=heads, max_size=heads), min_size=1, max_size=6)
    )
    windows = draw(
        st.lists(st.sampled_from([None, 32]), min_size=len(labels), max_size=len(labels))
    )
    return labels, windows, num_ranks


@given(models(), st.integers(1 << 20, 1 << 22))
def test_ranks_share_out_the_whole_cache(
    model: tuple[list[list[bool]], list[int | None], int], budget: int
) -> None:
    labels, windows, num_ranks = model
    shape, dealing = shape_of(labels, windows), deal_heads(labels, num_ranks)
    plan, layout = plan_ranks(shape, budget, MAX_MODEL_LEN, dealing)
    assert plan.shape == shape
    assert plan.num_blocks == layout.num_blocks
    pages = [0] * len(shape.groups)
    for rank in range(num_ranks):
        local = local_arena(layout, shape.groups, HeadShare(dealing, rank))
        assert local.layout.total_bytes <= budget
        for index, group in enumerate(local.groups):
            assert local.layout.num_blocks[index] == plan.num_blocks[group]
            pages[group] += local.layout.group_pages[index]
        for layer, own in enumerate(dealing.heads):
            for number, head in enumerate(own[rank]):
                group, _ = layout.head_page(layer, head)
                index, _ = local.layout.head_page(layer, number)
                assert local.groups[index] == group
    assert tuple(pages) == layout.group_pages


def test_one_rank_is_planned_as_without_ranks() -> None:
    labels = [[True, False], [False, False]]
    shape = shape_of(labels, [None, None])
    expected = plan_memory(shape, 1 << 20, MAX_MODEL_LEN)
    assert plan_ranks(shape, 1 << 20, MAX_MODEL_LEN, deal_heads(labels, 1)) == expected
    local = local_arena(expected[1], shape.groups, None)
    assert (local.layout, local.groups) == (expected[1], (0, 1))


def test_two_ranks_hold_twice_the_context() -> None:
    labels = [[True, True, False, False]] * 2
    shape = shape_of(labels, [None, None])
    alone, _ = plan_memory(shape, 1 << 18, 1 << 20)
    both, _ = plan_ranks(shape, 1 << 18, 1 << 20, deal_heads(labels, 2))
    assert both.max_sequence_tokens > 1.9 * alone.max_sequence_tokens


def test_a_rank_that_holds_no_sequence_is_said() -> None:
    labels = [[True, False]]
    with pytest.raises(CapacityError):
        plan_ranks(shape_of(labels, [None]), 100, MAX_MODEL_LEN, deal_heads(labels, 2))
