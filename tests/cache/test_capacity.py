import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headlong.cache.cache_shape import CacheShape
from headlong.cache.capacity import (
    CapacityError,
    MemoryPlan,
    longest_sequence,
    plan_blocks,
    plan_memory,
)
from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.cache.reservation import Reservation
from headlong.kernels.layout import QUANTISATIONS
from support.shapes import BLOCK_SIZE, PAGE_BYTES, STREAMING, build_shape

SHAPES = st.builds(
    build_shape,
    st.dictionaries(
        st.just(RETRIEVAL) | st.builds(HeadPolicy, st.integers(0, 9), st.integers(1, 30)),
        st.integers(1, 5),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 9),
    st.integers(1, 64),
    st.just(0) | st.integers(1, 300),
)


@given(SHAPES, st.integers(0, 200_000), st.integers(1, 500))
def test_a_plan_keeps_to_its_budget_and_holds_a_sequence(
    shape: CacheShape, budget_bytes: int, max_model_len: int
) -> None:
    try:
        plan, layout = plan_memory(shape, budget_bytes, max_model_len)
    except CapacityError:
        return
    assert layout.num_blocks == plan.num_blocks
    assert layout.total_bytes == plan.arena_bytes <= budget_bytes
    assert 1 <= plan.max_sequence_tokens <= max_model_len
    cache = KVCache(shape.groups, layout)
    assert cache.fits(plan.max_sequence_tokens)
    if plan.max_sequence_tokens < max_model_len:
        assert not cache.fits(plan.max_sequence_tokens + 1)
    longest = -(-max_model_len // BLOCK_SIZE)
    assert max(plan.num_blocks) <= shape.max_num_seqs * longest


@given(SHAPES, st.integers(0, 100_000), st.integers(0, 100_000), st.integers(1, 500))
def test_what_fits_a_budget_fits_a_larger_one(
    shape: CacheShape, budget_bytes: int, more: int, max_model_len: int
) -> None:
    try:
        small = plan_blocks(shape, budget_bytes, max_model_len)
    except CapacityError:
        return
    large = plan_blocks(shape, budget_bytes + more, max_model_len)
    for few, many in zip(small, large, strict=True):
        assert few <= many


@given(SHAPES, st.integers(0, 200_000), st.integers(1, 300), st.data())
def test_sequence_bytes_is_what_a_sequence_owns(
    shape: CacheShape, budget_bytes: int, max_model_len: int, data: st.DataObject
) -> None:
    try:
        plan, layout = plan_memory(shape, budget_bytes, max_model_len)
    except CapacityError:
        return
    cache = KVCache(shape.groups, layout)
    sequence = cache.begin()
    chunk = data.draw(st.integers(1, shape.max_num_batched_tokens))
    prompt = data.draw(st.integers(1, plan.max_sequence_tokens))
    while sequence.num_tokens < plan.max_sequence_tokens:
        left = prompt - sequence.num_tokens
        before = sequence.num_tokens
        count = cache.max_extension(sequence, min(chunk, left) if left > 0 else 1)
        assert count > 0
        cache.extend(sequence, count)
        assert cache.owned_blocks == shape.sequence_blocks(before + count, count)
        cache.release_expired(sequence)
        assert cache.owned_bytes == plan.sequence_bytes(sequence.num_tokens)
    cache.free(sequence)
    cache.check_integrity()
    assert cache.owned_blocks == (0,) * len(shape.groups)


def test_one_group_that_grows_gets_all_memory() -> None:
    shape = build_shape({RETRIEVAL: 3})
    assert plan_blocks(shape, 50 * 3 * PAGE_BYTES + 256, 10_000) == (50,)


def test_no_group_gets_more_than_its_sequences_could_own() -> None:
    shape = build_shape({RETRIEVAL: 3, STREAMING: 1}, max_num_seqs=4)
    retrieval, streaming = plan_blocks(shape, 1 << 40, 1000)
    assert retrieval == 4 * 250
    # A sink block, a window of at most 4 blocks, and a step of 8 blocks that every sequence may
    # begin inside one.
    assert streaming == 4 * (1 + 4) + 8 + 4
    assert plan_blocks(shape, 1 << 40, 8) == (4 * 2, 4 * 2)


def test_only_windows_take_a_constant() -> None:
    shape = build_shape({STREAMING: 2})
    plan, _ = plan_memory(shape, 1 << 20, 1_000_000)
    assert plan.max_sequence_tokens == 1_000_000
    assert plan.cache_tokens is None
    assert plan.shape.growing_token_bytes == 0
    assert plan.sequence_bytes(900_000) <= shape.constant_sequence_bytes == 5 * 2 * PAGE_BYTES


def test_windows_are_sized_for_fewer_sequences_where_memory_is_tight() -> None:
    shape = build_shape({RETRIEVAL: 1, STREAMING: 1}, max_num_seqs=64, max_num_batched_tokens=4)
    budget = 200 * PAGE_BYTES + 2 * 256
    retrieval, streaming = plan_blocks(shape, budget, 100_000)
    # For 16 sequences: 16 * 5 blocks of windows, and 1 + 16 for a step's tokens.
    assert streaming == 97
    assert retrieval == 100


@given(budgets=st.tuples(st.integers(40, 4000), st.integers(0, 400)))
def test_more_memory_never_shortens_the_context(budgets: tuple[int, int]) -> None:
    shape = build_shape({RETRIEVAL: 1, STREAMING: 3}, max_num_seqs=16, max_num_batched_tokens=16)
    smaller, more = budgets
    small, _ = plan_memory(shape, smaller * PAGE_BYTES, 4096)
    large, _ = plan_memory(shape, (smaller + more) * PAGE_BYTES, 4096)
    assert large.max_sequence_tokens >= small.max_sequence_tokens
    assert large.num_blocks[0] >= small.num_blocks[0]
    assert large.num_blocks[1] >= small.num_blocks[1]


def test_enough_memory_serves_all_sequences_at_full_length() -> None:
    shape = build_shape({RETRIEVAL: 1, STREAMING: 3}, max_num_seqs=4, max_num_batched_tokens=4)
    plan, _ = plan_memory(shape, 1 << 24, 64)
    longest = 64 // BLOCK_SIZE
    steady = STREAMING.steady_blocks(64, BLOCK_SIZE)
    assert plan.num_blocks[0] == 4 * longest
    assert plan.num_blocks[1] == min(4 * longest, 4 * steady + 1 + 4)


@pytest.mark.parametrize("policies", [{RETRIEVAL: 1}, {STREAMING: 1}, {RETRIEVAL: 2, STREAMING: 3}])
def test_too_small_a_budget_is_refused_and_says_what_it_takes(
    policies: dict[HeadPolicy, int],
) -> None:
    shape = build_shape(policies)
    with pytest.raises(CapacityError, match="100 bytes hold no sequence") as raised:
        plan_memory(shape, 100, 64)
    assert re.search(r"windows take \d+ bytes", str(raised.value))
    assert isinstance(raised.value, ValueError)


def test_bytes_of_a_token_and_of_a_sequence() -> None:
    shape = build_shape({RETRIEVAL: 1, STREAMING: 3})
    assert shape.block_bytes(shape.groups[1]) == 3 * PAGE_BYTES
    assert shape.growing_token_bytes == PAGE_BYTES // BLOCK_SIZE
    assert shape.full_token_bytes == 4 * PAGE_BYTES // BLOCK_SIZE
    plan, layout = plan_memory(shape, 1 << 20, 4096)
    assert plan.arena_bytes == layout.total_bytes
    assert plan.full_cache_tokens == plan.arena_bytes // shape.full_token_bytes
    assert plan.cache_tokens == plan.num_blocks[0] * BLOCK_SIZE
    # 1001 tokens: 251 blocks; of the windows the sink's, and the four that hold 990 to 1000.
    assert plan.sequence_bytes(1001) == (251 + 3 * (1 + 4)) * PAGE_BYTES
    assert plan.full_sequence_bytes(1001) == 251 * 4 * PAGE_BYTES


def test_a_full_cache_is_no_smaller() -> None:
    plan, _ = plan_memory(build_shape({RETRIEVAL: 1, STREAMING: 3}), 1 << 20, 4096)
    for num_tokens in range(0, 200, 3):
        assert plan.sequence_bytes(num_tokens) <= plan.full_sequence_bytes(num_tokens)
    everything = MemoryPlan(
        build_shape({RETRIEVAL: 4}), num_blocks=(8,), arena_bytes=1, max_sequence_tokens=32
    )
    assert everything.sequence_bytes(33) == everything.full_sequence_bytes(33)


def test_longest_sequence_is_bounded_by_what_grows_alone() -> None:
    shape = build_shape({RETRIEVAL: 1, STREAMING: 1})
    assert longest_sequence(shape, (10, 6), 1000) == 40
    assert longest_sequence(shape, (10, 6), 32) == 32


def test_wider_policies_get_their_tokens_in_the_streaming_group_alone() -> None:
    sliding = HeadPolicy(sink_size=0, window_size=20)
    policies = {RETRIEVAL: 1, STREAMING: 2, sliding: 1}
    plain = plan_blocks(build_shape(policies), 1 << 18, 4096)
    wide = plan_blocks(build_shape(policies, wide_tokens=101), 1 << 18, 4096)
    assert wide[1] == plain[1] + 26
    assert wide[2] == plain[2]
    # What they take is missing elsewhere: a streaming block is as large as two of the others.
    assert wide[0] == plain[0] - 2 * 26


def test_a_request_with_a_wider_policy_fits_beside_all_others() -> None:
    shape = build_shape({RETRIEVAL: 1, STREAMING: 1}, wide_tokens=200)
    plan, layout = plan_memory(shape, 1 << 20, 4096)
    cache = KVCache(shape.groups, layout)
    held = []
    for _ in range(shape.max_num_seqs - 1):
        sequence = cache.begin()
        cache.extend(sequence, 1)
        held.append(Reservation(cache.policies(), 400, sequence))
    full = cache.policies(RETRIEVAL)
    assert cache.has_room(Reservation(full, 200), held)
    assert not cache.has_room(Reservation(full, 400), held)
    assert plan.arena_bytes <= 1 << 20


def test_wider_policies_get_no_more_than_all_sequences_could_own() -> None:
    shape = build_shape({RETRIEVAL: 1, STREAMING: 1}, wide_tokens=1 << 20)
    assert plan_blocks(shape, 1 << 30, 100) == (4 * 25, 4 * 25)


def test_the_step_and_the_number_of_sequences_size_only_windows() -> None:
    shape = build_shape({RETRIEVAL: 1, STREAMING: 1}, max_num_seqs=1, max_num_batched_tokens=8)
    wide = dataclasses.replace(shape, max_num_batched_tokens=16)
    budget = 100 * PAGE_BYTES + 2 * 256
    _, few = plan_blocks(shape, budget, 4096)
    _, many = plan_blocks(wide, budget, 4096)
    assert many - few == 2


@given(SHAPES, st.integers(0, 200_000), st.integers(1, 300), st.data())
def test_a_plan_holds_the_sequences_that_can_all_be_admitted(
    shape: CacheShape, budget_bytes: int, num_tokens: int, data: st.DataObject
) -> None:
    try:
        plan, layout = plan_memory(shape, budget_bytes, num_tokens)
    except CapacityError:
        return
    cache = KVCache(shape.groups, layout)
    num_seqs = data.draw(st.integers(1, 6))
    # Nothing is cached and nothing runs, so forks count as sequences of their own.
    all_of_them = Reservation(cache.policies(), num_tokens, forks=num_seqs - 1)
    assert plan.holds(num_seqs, num_tokens) == cache.has_room(all_of_them, [])


def test_a_plan_holds_no_sequence_without_its_last_block() -> None:
    shape = build_shape({RETRIEVAL: 1, HeadPolicy(sink_size=4, window_size=14): 1})
    plan, _ = plan_memory(shape, 100_000, 1000)
    # 100 tokens; a block of sinks, and 13 tokens before the query's own, which can begin last in
    # a block: one block more than between steps.
    exact = dataclasses.replace(plan, num_blocks=(3 * 25, 3 * (1 + 5)))
    assert exact.holds(3, 100)
    for group in range(2):
        fewer = tuple(count - (place == group) for place, count in enumerate(exact.num_blocks))
        assert not dataclasses.replace(plan, num_blocks=fewer).holds(3, 100)


@pytest.mark.parametrize(
    ("name", "page_bytes"), [("fp8", 64 + 16), ("int8", 64 + 16), ("int4", 32 + 32)]
)
def test_quantised_pages_are_sized_by_the_same_code(name: str, page_bytes: int) -> None:
    """A page of 4 tokens of 8 elements: K and V, then scales, and minima with 4 bits."""
    plain = build_shape({RETRIEVAL: 2, STREAMING: 2})
    formats = dict.fromkeys(("retrieval", "streaming"), QUANTISATIONS[name])
    small = dataclasses.replace(plain, formats=formats)
    assert {small.page(group).page_bytes for group in small.groups} == {page_bytes}
    assert small.growing_token_bytes == 2 * page_bytes // BLOCK_SIZE
    assert small.constant_sequence_bytes * PAGE_BYTES == plain.constant_sequence_bytes * page_bytes
    plan, layout = plan_memory(small, 1 << 20, 1 << 20)
    assert layout.total_bytes == plan.arena_bytes <= 1 << 20
    more, _ = plan_memory(plain, 1 << 20, 1 << 20)
    assert plan.max_sequence_tokens > 2.9 * more.max_sequence_tokens


def test_each_kind_of_head_has_its_own_pages() -> None:
    plain = build_shape({RETRIEVAL: 2, STREAMING: 3, HeadPolicy(0, 20): 1})
    mixed = dataclasses.replace(
        plain, formats={"retrieval": QUANTISATIONS["int4"], "sliding": QUANTISATIONS["int8"]},
        summarised=True, compensated=True,
    )  # fmt: skip
    retrieval, streaming, sliding = mixed.groups
    # Four float32 bounds of 8 channels; float32 sums of K and of V.
    assert mixed.block_bytes(retrieval) == 2 * (64 + 4 * 8 * 4)
    assert mixed.block_bytes(streaming) == 3 * (PAGE_BYTES + 2 * 8 * 4)
    assert mixed.block_bytes(sliding) == 64 + 16
    plan, layout = plan_memory(mixed, 1 << 18, 4096)
    assert layout.pages == tuple(map(mixed.page, mixed.groups))
    assert layout.total_bytes == plan.arena_bytes <= 1 << 18


def test_bytes_by_group_add_up() -> None:
    shape = build_shape({RETRIEVAL: 1, STREAMING: 3})
    retrieval, streaming = shape.groups
    assert shape.token_bytes(retrieval) == shape.growing_token_bytes
    assert shape.window_bytes(retrieval) == shape.token_bytes(streaming) == 0
    assert shape.window_bytes(streaming) == shape.constant_sequence_bytes
