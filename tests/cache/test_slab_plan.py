"""Sizing an arena that groups share."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headlong.cache.cache_shape import CacheShape
from headlong.cache.capacity import CapacityError, MemoryPlan, plan_memory
from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.cache.reservation import Reservation
from headlong.kernels.layout import ArenaLayout
from support.shapes import BLOCK_SIZE, PAGE_BYTES, STREAMING, build_shape

SHAPES = st.builds(
    build_shape,
    st.lists(
        st.tuples(st.builds(HeadPolicy, st.integers(0, 9), st.integers(1, 30)), st.integers(1, 5)),
        max_size=2,
        unique_by=lambda each: each[0],
    ).map(lambda windows: {RETRIEVAL: 1 + len(windows), **dict(windows)}),
    st.integers(1, 9),
    st.integers(1, 64),
    st.just(0) | st.integers(1, 300),
)


def in_slabs(shape: CacheShape) -> CacheShape:
    return dataclasses.replace(shape, in_slabs=True)


def build_cache(plan: MemoryPlan, layout: ArenaLayout) -> KVCache:
    return KVCache(
        plan.shape.groups,
        layout,
        copy_blocks=lambda copies: None,
        wide_tokens=plan.shape.wide_tokens,
    )


@settings(max_examples=200)
@given(SHAPES, st.integers(0, 200_000), st.integers(1, 500))
def test_a_plan_in_slabs_says_what_the_cache_holds(
    shape: CacheShape, budget_bytes: int, max_model_len: int
) -> None:
    try:
        plan, layout = plan_memory(in_slabs(shape), budget_bytes, max_model_len)
    except CapacityError:
        with pytest.raises(CapacityError):
            plan_memory(shape, budget_bytes, max_model_len)
        return
    assert layout.total_bytes == plan.arena_bytes <= budget_bytes
    assert layout.num_slabs == plan.num_slabs
    cache = build_cache(plan, layout)
    longest = plan.max_sequence_tokens
    assert 1 <= longest <= max_model_len
    assert cache.fits(longest)
    if plan.num_slabs:
        assert longest == max_model_len or not cache.fits(longest + 1)
        for group, pool in enumerate(cache.pools):
            assert pool.num_free == plan.num_blocks[group]
    try:
        fixed, _ = plan_memory(shape, budget_bytes, max_model_len)
    except CapacityError:
        return
    assert longest >= fixed.max_sequence_tokens


@settings(max_examples=100)
@given(SHAPES, st.integers(0, 200_000), st.integers(1, 300), st.integers(1, 6))
def test_a_plan_in_slabs_holds_the_sequences_that_can_all_be_admitted(
    shape: CacheShape, budget_bytes: int, num_tokens: int, num_seqs: int
) -> None:
    try:
        plan, layout = plan_memory(in_slabs(shape), budget_bytes, num_tokens)
    except CapacityError:
        return
    cache = build_cache(plan, layout)
    all_of_them = Reservation(cache.policies(), num_tokens, forks=num_seqs - 1)
    assert plan.holds(num_seqs, num_tokens) == cache.has_room(all_of_them, [])


def test_nothing_is_set_aside_for_windows_that_are_not_there() -> None:
    shape = build_shape({RETRIEVAL: 1, STREAMING: 3}, max_num_seqs=64)
    budget = 400 * PAGE_BYTES
    plan, _ = plan_memory(in_slabs(shape), budget, 4096)
    fixed, _ = plan_memory(shape, budget, 4096)
    # One sequence has a window of five blocks of three pages in a step, and all other pages.
    assert (plan.slab_bytes, plan.num_slabs) == (3 * PAGE_BYTES, 133)
    assert plan.max_sequence_tokens == (133 - 5) * 3 * BLOCK_SIZE
    assert fixed.max_sequence_tokens < plan.max_sequence_tokens
    # The last slab of the retrieval group is full, so there is none for a second sequence.
    assert plan.cache_tokens == plan.max_sequence_tokens


def test_tokens_in_all_are_those_of_sequences_as_long_as_may_be() -> None:
    shape = build_shape({RETRIEVAL: 1, STREAMING: 1}, max_num_seqs=3)
    plan, _ = plan_memory(in_slabs(shape), 60 * PAGE_BYTES, 64)
    # A sequence of 64 tokens takes 16 and 5 blocks: two of them 42 of 60, and 5 more leave 13.
    assert plan.holds(2, 64)
    assert not plan.holds(3, 64)
    assert plan.cache_tokens == 2 * 64 + 13 * BLOCK_SIZE
    enough, _ = plan_memory(in_slabs(shape), 1 << 20, 64)
    assert enough.cache_tokens == 3 * 64
    only_windows = build_shape({STREAMING: 2, HeadPolicy(0, 20): 1})
    assert plan_memory(in_slabs(only_windows), 1 << 16, 64)[0].cache_tokens is None


def test_there_is_no_more_than_sequences_that_keep_everything_could_own() -> None:
    shape = build_shape({RETRIEVAL: 1, STREAMING: 1, HeadPolicy(0, 12): 1}, max_num_seqs=2)
    plan, _ = plan_memory(in_slabs(shape), 1 << 30, 64)
    fixed, _ = plan_memory(shape, 1 << 30, 64)
    assert plan.num_slabs == 2 * 16 + 2 * 16 + fixed.num_blocks[2]


def test_one_group_has_the_arena_for_itself() -> None:
    shape = build_shape({RETRIEVAL: 3})
    assert plan_memory(in_slabs(shape), 1 << 18, 4096)[0].num_slabs == 0


def test_what_wider_requests_hold_is_left_for_them() -> None:
    shape = build_shape({RETRIEVAL: 1, STREAMING: 1}, wide_tokens=200)
    plan, layout = plan_memory(in_slabs(shape), 400 * PAGE_BYTES, 4096)
    cache = build_cache(plan, layout)
    assert plan.max_sequence_tokens == (400 - 50 - 5) * BLOCK_SIZE
    assert cache.has_room(Reservation(cache.policies(), plan.max_sequence_tokens), [])
    held = cache.begin()
    cache.extend(held, 1)
    longest = Reservation(cache.policies(), plan.max_sequence_tokens - 200, held)
    full = cache.policies(RETRIEVAL)
    assert cache.has_room(Reservation(full, 200), [longest])
