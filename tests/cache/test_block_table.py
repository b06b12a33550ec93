import pytest
from hypothesis import given
from hypothesis import strategies as st

from headlong.cache.block_table import BlockTable
from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.kernels.batch import UNBOUNDED
from support.visibility import reachable

POLICIES = st.builds(HeadPolicy, st.integers(0, 12), st.integers(1, 25) | st.just(UNBOUNDED))


def test_entries_of_sinks_and_of_a_window_that_moved() -> None:
    table = BlockTable(HeadPolicy(sink_size=5, window_size=8), block_size=4)
    assert (table.num_sink_blocks, table.window_start) == (2, 2)
    table.add([10, 11, 12, 13, 14, 15])
    # The query at 21 sees 14 to 21: block 2 (8 to 11) is out of reach, block 3 (12 to 15) is not.
    assert table.take_expired(21) == [12]
    assert table.blocks.tolist() == [10, 11, 13, 14, 15]
    assert [table.find(logical) for logical in range(7)] == [10, 11, None, 13, 14, 15, None]
    assert table.window_blocks.tolist() == [13, 14, 15]
    assert table.num_logical_blocks == 6
    table.add([16])
    assert table.find(6) == 16


def test_a_sink_block_that_does_not_exist_yet_is_not_found() -> None:
    table = BlockTable(HeadPolicy(sink_size=9, window_size=4), block_size=4)
    table.add([7])
    assert table.find(0) == 7
    assert table.find(1) is None
    assert table.window_blocks.tolist() == []


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(0, 0), (1, 0), (8, 0), (9, 1), (16, 2), (17, 3)]
)
def test_missing_blocks(num_tokens: int, expected: int) -> None:
    table = BlockTable(RETRIEVAL, block_size=4)
    table.add([3, 5])
    assert table.missing_blocks(num_tokens) == expected


def test_a_retrieval_table_gives_nothing_back() -> None:
    table = BlockTable(RETRIEVAL, block_size=4)
    table.add(list(range(100)))
    assert table.take_expired(400) == []
    assert len(table.blocks) == 100


@given(
    POLICIES,
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(1, 17), st.booleans()), max_size=12),
)
def test_what_expires_is_what_the_law_cannot_reach(
    policy: HeadPolicy, block_size: int, steps: list[tuple[int, bool]]
) -> None:
    table = BlockTable(policy, block_size)
    num_tokens = allocated = 0
    given_back: set[int] = set()
    for new, release in steps:
        num_tokens += new
        missing = table.missing_blocks(num_tokens)
        # A block's id is its logical index, so a table must read as the identity.
        table.add(list(range(allocated, allocated + missing)))
        allocated += missing
        if not release:
            continue
        expired = table.take_expired(num_tokens)
        assert given_back.isdisjoint(expired)
        given_back |= set(expired)
        # Tokens that are still to come into the last block are reachable too.
        needed = {
            key // block_size for key in reachable(policy, num_tokens, allocated * block_size)
        }
        sinks = set(range(table.num_sink_blocks))
        assert set(table.blocks) == (needed | sinks) & set(range(allocated))
        assert given_back == set(range(allocated)) - set(table.blocks)
        assert table.take_expired(num_tokens) == []
    assert table.num_logical_blocks == allocated
    for logical in range(allocated):
        assert table.find(logical) == (None if logical in given_back else logical)
    assert table.find(allocated) is None


def test_all_blocks_of_a_retrieval_table_stay() -> None:
    table = BlockTable(RETRIEVAL, block_size=4)
    table.add([3, 5])
    assert table.window_blocks.tolist() == []


@given(POLICIES, st.integers(1, 6), st.integers(0, 30), st.integers(0, 30))
def test_a_table_that_starts_with_shared_blocks_is_as_one_that_grew(
    policy: HeadPolicy, block_size: int, num_blocks: int, more: int
) -> None:
    grown, started = BlockTable(policy, block_size), BlockTable(policy, block_size)
    num_tokens = num_blocks * block_size
    grown.add(list(range(num_blocks)))
    grown.take_expired(num_tokens)
    started.start_with(policy.reachable_blocks(num_blocks, block_size), num_tokens)
    for table in (grown, started):
        missing = table.missing_blocks(num_tokens + more)
        table.add(list(range(table.num_logical_blocks, table.num_logical_blocks + missing)))
    assert started.blocks == grown.blocks
    assert started.window_start == grown.window_start
    assert started.take_expired(num_tokens + more) == grown.take_expired(num_tokens + more)
