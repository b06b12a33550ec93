import pytest
from hypothesis import given
from hypothesis import strategies as st

from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.kernels.batch import UNBOUNDED
from support.visibility import is_visible, reachable

BLOCK_SIZES = st.integers(1, 9)
LENGTHS = st.integers(0, 90)
POLICIES = st.builds(HeadPolicy, st.integers(0, 20), st.integers(1, 40) | st.just(UNBOUNDED))


@pytest.mark.parametrize(
    ("sink_size", "window_size", "argument"),
    [(-1, 4, "sink_size"), (0, 0, "window_size"), (0, UNBOUNDED + 1, "window_size")],
)
def test_a_size_out_of_range_is_refused(sink_size: int, window_size: int, argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        HeadPolicy(sink_size, window_size)


def test_retrieval_keeps_all() -> None:
    assert RETRIEVAL.keeps_all
    assert not HeadPolicy(4, UNBOUNDED - 1).keeps_all
    assert RETRIEVAL.sink_blocks(16) == 0


@given(POLICIES, st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_reachable_is_the_union_over_all_queries(
    policy: HeadPolicy, first_query: int, num_tokens: int, more: int
) -> None:
    queries = range(first_query, first_query + num_tokens + more + 1)
    expected = [
        key for key in range(num_tokens) if any(is_visible(policy, query, key) for query in queries)
    ]
    assert reachable(policy, first_query, num_tokens) == expected


@given(POLICIES, LENGTHS, BLOCK_SIZES)
def test_window_start_is_the_first_reachable_block_after_the_sinks(
    policy: HeadPolicy, num_tokens: int, block_size: int
) -> None:
    sinks = policy.sink_blocks(block_size)
    # The query at `num_tokens` sees itself, so there always is a last candidate.
    keys = reachable(policy, num_tokens, num_tokens + 1)
    windows = [key // block_size for key in keys if key > num_tokens - policy.window_size]
    assert policy.window_start(num_tokens, block_size) == max(sinks, min(windows))


@given(POLICIES, LENGTHS, st.integers(0, 40), BLOCK_SIZES)
def test_live_blocks_counts_what_the_step_may_touch(
    policy: HeadPolicy, num_tokens: int, num_new: int, block_size: int
) -> None:
    end = num_tokens + num_new
    allocated = range(-(-end // block_size))
    start = policy.window_start(num_tokens, block_size)
    owned = {
        block for block in allocated if block < policy.sink_blocks(block_size) or block >= start
    }
    assert policy.live_blocks(num_tokens, num_new, block_size) == len(owned)
    assert {key // block_size for key in reachable(policy, num_tokens, end)} <= owned


@given(POLICIES, LENGTHS, BLOCK_SIZES)
def test_steady_blocks_bounds_every_length_and_is_nearly_reached(
    policy: HeadPolicy, num_tokens: int, block_size: int
) -> None:
    most = max(policy.live_blocks(length, 0, block_size) for length in range(num_tokens + 1))
    bound = policy.steady_blocks(num_tokens, block_size)
    assert most <= bound <= most + 1
    assert bound <= -(-num_tokens // block_size)


@given(POLICIES, LENGTHS, BLOCK_SIZES)
def test_step_blocks_bounds_every_step_of_one_token_and_is_nearly_reached(
    policy: HeadPolicy, num_tokens: int, block_size: int
) -> None:
    most = max((policy.live_blocks(n, 1, block_size) for n in range(num_tokens)), default=0)
    bound = policy.step_blocks(num_tokens, block_size)
    assert most <= bound <= most + 1
    assert policy.steady_blocks(num_tokens, block_size) <= bound <= -(-num_tokens // block_size)


@given(POLICIES, st.integers(0, 30), st.integers(0, 40), BLOCK_SIZES)
def test_reachable_blocks_are_those_that_later_queries_see(
    policy: HeadPolicy, num_blocks: int, more: int, block_size: int
) -> None:
    first_query = num_blocks * block_size
    keys = reachable(policy, first_query, first_query + more)
    seen = {key // block_size for key in keys if key < first_query}
    kept = policy.reachable_blocks(num_blocks, block_size)
    assert kept == sorted(set(kept))
    # Sinks and window are kept by whole blocks; of the rest nothing is.
    assert set(kept) == seen


def test_steady_blocks_of_a_window_do_not_grow() -> None:
    policy = HeadPolicy(sink_size=128, window_size=256)
    # 8 blocks of sinks; 255 tokens of window touch at most 17.
    assert policy.steady_blocks(1_000_000, 16) == 25
    assert policy.steady_blocks(UNBOUNDED, 16) == 25
    assert RETRIEVAL.steady_blocks(1_000_000, 16) == 62_500
