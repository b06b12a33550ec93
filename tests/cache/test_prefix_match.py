from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headlong.cache.block_pool import BlockPool
from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.cache.prefix_keys import PrefixKeys
from headlong.cache.prefix_match import PrefixMatch, match_prefix
from support.visibility import reachable

POLICIES = st.builds(HeadPolicy, st.integers(0, 9), st.integers(1, 14)) | st.just(RETRIEVAL)


class Lookup:
    """Pools in which the test says which blocks are there, and which were evicted."""

    def __init__(self, policies: Sequence[HeadPolicy], num_tokens: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_tokens = num_tokens
        self.keys = PrefixKeys(b"", tuple(policies), "", block_size)
        self.keys.extend(range(num_tokens))
        self.pools = [BlockPool(100) for _ in policies]

    def put(self, group: int, present: Sequence[bool | None]) -> None:
        """Blocks that are there (True), were evicted (None), or never were (False)."""
        pool = self.pools[group]
        evicted = [
            key for key, here in zip(self.keys.blocks, present, strict=False) if here is None
        ]
        self._publish(pool, evicted)
        # A pool full of owned blocks has evicted what was cached; those are then given back.
        pool.release(pool.allocate(pool.num_blocks))
        self._publish(
            pool, [key for key, here in zip(self.keys.blocks, present, strict=False) if here]
        )

    @staticmethod
    def _publish(pool: BlockPool, keys: Sequence[bytes]) -> None:
        blocks = pool.allocate(len(keys))
        for block, key in zip(blocks, keys, strict=True):
            pool.publish(block, key)
        pool.release(blocks)

    def match(self, num_tokens: int | None = None, salted_elsewhere: bool = False) -> PrefixMatch:
        asked = self.num_tokens if num_tokens is None else num_tokens
        found = match_prefix(
            self.keys, asked, self.pools, self.block_size, salted_elsewhere=salted_elsewhere
        )
        assert found.num_tokens + sum(found.misses.values()) == asked
        assert min(found.misses.values(), default=1) > 0
        return found


STREAMING = HeadPolicy(sink_size=2, window_size=5)


def test_a_window_needs_only_what_queries_after_the_prefix_see() -> None:
    lookup = Lookup([RETRIEVAL, STREAMING], num_tokens=21, block_size=2)
    lookup.put(0, [True] * 10)
    # A query at 20 sees 0, 1 and 16 to 20: blocks 0, 8 and 9.
    lookup.put(1, [True] + [False] * 7 + [True] * 2)
    found = lookup.match()
    assert found.num_tokens == 20
    assert found.misses == {"partial_block": 1}
    assert found.blocks[0] == tuple(lookup.pools[0].find(key) for key in lookup.keys.blocks)
    assert found.blocks[1] == tuple(
        lookup.pools[1].find(lookup.keys.blocks[index]) for index in (0, 8, 9)
    )
    assert found.keys == tuple(lookup.keys.blocks)


def test_a_prefix_is_cut_back_to_where_the_window_is_whole() -> None:
    lookup = Lookup([RETRIEVAL, STREAMING], num_tokens=21, block_size=2)
    lookup.put(0, [True] * 10)
    # Block 8 is gone. A query at 14 sees 10 to 14, but at 16 and at 18 not all of 12 to 18.
    lookup.put(1, [True, False, False, False, False, True, True, True, None, True])
    found = lookup.match()
    assert found.num_tokens == 16
    assert found.misses == {"window_evicted": 4, "partial_block": 1}


def test_what_one_window_lacks_the_other_has_to_make_good_for_too() -> None:
    lookup = Lookup([RETRIEVAL, HeadPolicy(0, 5), HeadPolicy(0, 3)], num_tokens=21, block_size=2)
    lookup.put(0, [True] * 10)
    # Enough for 20 tokens and for 14, but not for the 18 that the other group can go on from.
    lookup.put(1, [True] * 7 + [False] + [True] * 2)
    lookup.put(2, [True] * 9 + [False])
    assert lookup.match().num_tokens == 14


def test_without_its_sinks_a_group_has_nothing() -> None:
    lookup = Lookup([RETRIEVAL, STREAMING], num_tokens=21, block_size=2)
    lookup.put(0, [True] * 10)
    lookup.put(1, [None] + [True] * 9)
    found = lookup.match()
    assert found.num_tokens == 0
    assert found.blocks == ((), ())
    assert found.misses == {"window_evicted": 20, "partial_block": 1}


def test_a_prefix_within_the_sinks_needs_no_more_than_itself() -> None:
    lookup = Lookup([RETRIEVAL, HeadPolicy(8, 1)], num_tokens=7, block_size=2)
    lookup.put(0, [True] * 3)
    lookup.put(1, [True, True, False])
    assert lookup.match().num_tokens == 4


def test_what_was_evicted_is_told_from_what_never_was() -> None:
    lookup = Lookup([RETRIEVAL, STREAMING], num_tokens=21, block_size=2)
    lookup.put(0, [True] * 3 + [None] * 4 + [False] * 3)
    lookup.put(1, [True] * 7 + [False] * 3)
    found = lookup.match()
    assert found.num_tokens == 6
    assert found.misses == {"retrieval_evicted": 8, "never_seen": 6, "partial_block": 1}


def test_a_hole_hides_what_comes_after_it() -> None:
    lookup = Lookup([RETRIEVAL], num_tokens=9, block_size=2)
    lookup.put(0, [True, None, True, True])
    found = lookup.match()
    assert found.num_tokens == 2
    assert found.misses == {"retrieval_evicted": 6, "partial_block": 1}


def test_the_last_token_is_never_found() -> None:
    lookup = Lookup([RETRIEVAL], num_tokens=8, block_size=4)
    lookup.put(0, [True, True])
    assert lookup.match().num_tokens == 4
    assert lookup.match().misses == {"partial_block": 4}
    assert lookup.match(5).num_tokens == 4
    assert lookup.match(4).misses == {"partial_block": 4}
    assert lookup.match(1).misses == {"partial_block": 1}


@pytest.mark.parametrize(
    ("present", "misses"),
    [
        ([False, False], {"salt": 4, "partial_block": 1}),
        ([None, False], {"retrieval_evicted": 2, "never_seen": 2, "partial_block": 1}),
        ([True, False], {"never_seen": 2, "partial_block": 1}),
    ],
)
def test_a_salt_explains_a_miss_only_if_nothing_was_ever_there(
    present: list[bool | None], misses: dict[str, int]
) -> None:
    lookup = Lookup([RETRIEVAL], num_tokens=5, block_size=2)
    lookup.put(0, present)
    assert lookup.match(salted_elsewhere=True).misses == misses


def test_where_no_group_keeps_all_every_eviction_is_a_window_s() -> None:
    lookup = Lookup([STREAMING, HeadPolicy(0, 3)], num_tokens=21, block_size=2)
    lookup.put(0, [True] * 5 + [None] * 2 + [False] * 3)
    lookup.put(1, [False] * 4 + [True] + [None] * 3 + [False] * 2)
    found = lookup.match()
    assert found.num_tokens == 10
    assert found.misses == {"window_evicted": 6, "never_seen": 4, "partial_block": 1}


def test_too_few_keys_are_refused() -> None:
    lookup = Lookup([RETRIEVAL], num_tokens=8, block_size=4)
    with pytest.raises(ValueError, match="13 tokens were asked for, but 2 blocks named"):
        lookup.match(13)


@settings(max_examples=300)
@given(
    st.lists(POLICIES, min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 60),
    st.data(),
)
def test_the_match_is_the_longest_prefix_that_every_query_can_go_on_from(
    policies: list[HeadPolicy], block_size: int, num_tokens: int, data: st.DataObject
) -> None:
    lookup = Lookup(policies, num_tokens, block_size)
    num_blocks = (num_tokens - 1) // block_size
    # Mostly there, so that long prefixes are common.
    states = st.sampled_from([True] * 6 + [None, False])
    present = [
        data.draw(st.lists(states, min_size=num_blocks, max_size=num_blocks)) for _ in policies
    ]
    for group, here in enumerate(present):
        lookup.put(group, here)

    def goes_on(num_prefix: int) -> bool:
        tokens = num_prefix * block_size
        return all(
            present[group][key // block_size]
            for group, policy in enumerate(policies)
            for key in reachable(policy, tokens, tokens)
        )

    longest = max(n for n in range(num_blocks + 1) if goes_on(n))
    found = lookup.match()
    if any(policy.keeps_all for policy in policies):
        assert found.num_tokens == longest * block_size
    else:
        # What nobody remembers having computed is not worth a search.
        assert found.num_tokens <= longest * block_size
        assert goes_on(found.num_tokens // block_size)
    for group, policy in enumerate(policies):
        reach = policy.reachable_blocks(found.num_tokens // block_size, block_size)
        assert found.blocks[group] == tuple(
            lookup.pools[group].find(lookup.keys.blocks[index]) for index in reach
        )
