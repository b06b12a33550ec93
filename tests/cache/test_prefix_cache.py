"""Sequences that find what others left."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headlong.cache.block_pool import PASSED_SHARE
from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.cache.prefix_keys import PrefixKeys
from headlong.cache.sequence_cache import SequenceCache
from support.caches import build_cache

STREAMING = HeadPolicy(sink_size=3, window_size=6)
SLIDING = HeadPolicy(sink_size=0, window_size=5)


def build_mixed(num_blocks: Sequence[int] = (64, 64)) -> KVCache:
    return build_cache({"retrieval": RETRIEVAL, "streaming": STREAMING}, num_blocks)


class Runner:
    """One sequence with its tokens and keys, computed a few tokens a step as the engine would."""

    def __init__(
        self,
        cache: KVCache,
        tokens: Sequence[int],
        streaming: HeadPolicy | None = None,
        salt: str = "",
        chunk: int = 5,
    ) -> None:
        self.kv = cache
        self.tokens = list(tokens)
        self.keys: PrefixKeys = cache.keys(cache.policies(streaming), salt)
        self.keys.extend(self.tokens)
        self.match = cache.match(self.keys, len(self.tokens))
        self.cache: SequenceCache = cache.begin(self.keys.policies, self.match)
        self.chunk = chunk

    def run(self) -> "Runner":
        while self.cache.num_tokens < len(self.tokens):
            left = len(self.tokens) - self.cache.num_tokens
            self.kv.extend(self.cache, min(self.chunk, left))
            self.keys.extend(self.tokens)
            self.kv.publish(self.cache, self.keys)
            self.kv.release_expired(self.cache)
            self.kv.check_integrity()
        return self

    def grow(self, num_tokens: int) -> "Runner":
        self.chunk = 1
        self.tokens += range(1000, 1000 + num_tokens)
        return self.run()

    def free(self) -> "Runner":
        self.kv.free(self.cache)
        self.kv.check_integrity()
        return self


def test_an_equal_prompt_finds_all_but_its_last_block() -> None:
    cache = build_mixed()
    Runner(cache, range(24)).run().free()
    assert cache.owned_blocks == (0, 0)
    assert cache.cached_blocks == (6, 6)
    again = Runner(cache, range(24))
    assert again.match.num_tokens == again.cache.num_tokens == 20
    assert again.match.misses == {"partial_block": 4}
    # 20 tokens in every block of the one, and the sink block and those of 15 to 19 in the other.
    assert cache.owned_blocks == (5, 3)
    again.run().free()
    assert cache.owned_blocks == (0, 0)


def test_running_sequences_share_what_they_have_in_common() -> None:
    cache = build_mixed()
    first = Runner(cache, range(22)).run()
    owned = cache.owned_blocks
    second = Runner(cache, [*range(20), 90, 91])
    assert second.match.num_tokens == 20
    # All are owned already, except the window's block that the first one has left behind.
    assert cache.owned_blocks[0] == owned[0]
    assert second.cache.tables[0].blocks == first.cache.tables[0].blocks[:5]
    second.run()
    first.free()
    second.free()
    assert cache.owned_blocks == (0, 0)


def test_nothing_is_found_before_it_is_published() -> None:
    cache = build_mixed()
    runner = Runner(cache, range(20))
    cache.extend(runner.cache, 20)
    assert cache.match(runner.keys, 20).num_tokens == 0
    cache.publish(runner.cache, runner.keys)
    assert cache.match(runner.keys, 20).num_tokens == 16


def test_a_partly_filled_block_is_not_published() -> None:
    cache = build_mixed()
    Runner(cache, range(10)).run().free()
    assert Runner(cache, range(16)).match.num_tokens == 8


@given(
    st.builds(HeadPolicy, st.integers(0, 9), st.integers(1, 20)),
    st.integers(1, 5),
    st.integers(1, 60),
    st.integers(1, 25),
    st.integers(1, 9),
    st.sets(st.sampled_from(["retrieval", "streaming", "sliding"]), min_size=1),
)
def test_the_next_turn_goes_on_from_the_last_full_block(
    streaming: HeadPolicy, block_size: int, prompt: int, answer: int, chunk: int, names: set[str]
) -> None:
    policies = {"retrieval": RETRIEVAL, "streaming": streaming, "sliding": SLIDING}
    groups = {name: policy for name, policy in policies.items() if name in names}
    cache = build_cache(groups, [100] * len(groups), block_size)
    turn = Runner(cache, range(prompt), chunk=chunk).run().grow(answer).free()
    num_blocks = (prompt + answer) // block_size
    # Others take all that the next turn can do without, but for passed blocks that may stay.
    for policy, pool in zip(groups.values(), cache.pools, strict=True):
        needed = len(policy.reachable_blocks(num_blocks, block_size))
        pool.allocate(100 - needed - 100 // PASSED_SHARE)
    match = cache.match(turn.keys, prompt + answer + 1)
    assert match.num_tokens == num_blocks * block_size


def test_a_turn_that_fills_no_block_still_keeps_its_window() -> None:
    cache = build_mixed([64, 8])
    # From 21 tokens on no query sees key 15, so that block 3 is given back before the end.
    Runner(cache, range(20)).run().free()
    turn = Runner(cache, [*range(20), 50, 51])
    assert turn.match.num_tokens == 20
    assert 3 in STREAMING.reachable_blocks(5, 4)
    turn.run()
    assert turn.cache.tables[1].find(3) is None
    turn.free()
    cache.pools[1].allocate(8 - len(STREAMING.reachable_blocks(5, 4)) - 8 // PASSED_SHARE)
    assert cache.match(turn.keys, 22).num_tokens == 20


def test_a_turn_that_ends_before_it_publishes_still_keeps_its_window() -> None:
    cache = build_mixed([64, 10])
    Runner(cache, range(20)).run().free()
    turn = Runner(cache, range(22))
    cache.extend(turn.cache, 2)
    cache.release_expired(turn.cache)
    assert turn.cache.tables[1].find(3) is None
    # Used after block 3 was given back, and yet older than the end of the turn.
    Runner(cache, [7] * 5).run().free()
    turn.free()
    cache.pools[1].allocate(10 - len(STREAMING.reachable_blocks(5, 4)) - 10 // PASSED_SHARE)
    assert cache.match(turn.keys, 22).num_tokens == 20


def test_of_a_freed_sequence_the_tail_is_evicted_first_and_the_head_last() -> None:
    cache = build_cache({"retrieval": RETRIEVAL}, [6])
    runner = Runner(cache, range(24)).run().free()
    for num_evicted in range(1, 7):
        cache.pools[0].allocate(1)
        assert cache.match(runner.keys, 24).num_tokens == min(20, 24 - 4 * num_evicted)


def test_sinks_are_evicted_after_the_window() -> None:
    cache = build_mixed([64, 8])
    runner = Runner(cache, range(24)).run().free()
    cache.pools[1].allocate(5)
    found = [cache.pools[1].find(key) is not None for key in runner.keys.blocks]
    # Block 1 is the oldest that the window passed; of what was kept, 4 and 5 are the window.
    assert found == [True, False, True, True, False, False]


def test_a_long_prompt_does_not_push_out_what_conversations_go_on_from() -> None:
    cache = build_mixed([400, 60])
    talks = [Runner(cache, [each] * 22).run().free() for each in range(3, 8)]
    Runner(cache, range(100, 1300), chunk=40).run().free()
    assert [cache.match(talk.keys, 22).num_tokens for talk in talks] == [20] * 5


def test_a_passed_block_that_was_found_is_kept() -> None:
    """The end of a prompt that others begin with, in the middle of their own."""
    cache = build_mixed([400, 40])
    system = list(range(20))
    Runner(cache, [*system, *[50] * 100]).run().free()
    hit = Runner(cache, [*system, *[60] * 100])
    assert hit.match.num_tokens == 20
    hit.run().free()
    Runner(cache, range(100, 1300), chunk=40).run().free()
    assert Runner(cache, [*system, 70]).match.num_tokens == 20


def test_the_conversation_that_was_used_longest_ago_is_evicted_first() -> None:
    cache = build_cache({"retrieval": RETRIEVAL}, [9])
    first = Runner(cache, [1] * 12).run().free()
    second = Runner(cache, [2] * 12).run().free()
    Runner(cache, first.tokens).run().free()
    Runner(cache, [3] * 20).run().free()
    assert cache.match(first.keys, 12).num_tokens == 8
    lost = cache.match(second.keys, 12)
    assert lost.num_tokens == 4
    assert lost.misses == {"retrieval_evicted": 4, "partial_block": 4}


def test_what_an_equal_sequence_computed_at_the_same_time_counts_as_used() -> None:
    cache = build_cache({"retrieval": RETRIEVAL}, [12])
    twins = [Runner(cache, [1] * 12) for _ in range(2)]
    for twin in twins:
        twin.run()
    twins[0].free()
    other = Runner(cache, [2] * 12).run().free()
    # The second twin's blocks have no key of their own: the first one's are used again.
    twins[1].free()
    cache.pools[0].allocate(9)
    assert cache.match(twins[1].keys, 12).num_tokens == 8
    assert cache.match(other.keys, 12).num_tokens == 0


def test_what_an_equal_sequence_published_may_be_evicted_while_another_still_runs() -> None:
    cache = build_mixed([12, 12])
    twins = [Runner(cache, [1] * 20) for _ in range(2)]
    for twin in twins:
        twin.run()
    twins[0].free()
    for pool in cache.pools:
        pool.release(pool.allocate(pool.num_free))
    assert cache.cached_blocks == (0, 0)
    assert cache.match(twins[1].keys, 21).num_tokens == 0
    # The second twin's blocks had no key of their own, and take it over when it ends.
    twins[1].free()
    assert cache.match(twins[1].keys, 21).num_tokens == 20


def test_sequences_of_other_policies_share_nothing() -> None:
    cache = build_mixed()
    wide = HeadPolicy(3, 7)
    Runner(cache, range(20)).run().free()
    other = Runner(cache, range(20), streaming=wide)
    assert other.match.num_tokens == 0
    assert other.match.misses == {"never_seen": 16, "partial_block": 4}
    other.run()
    assert [table.policy for table in other.cache.tables] == [RETRIEVAL, wide]
    other.free()
    assert Runner(cache, range(20), streaming=wide).match.num_tokens == 16


def test_the_full_cache_is_a_policy_like_others() -> None:
    cache = build_mixed()
    runner = Runner(cache, range(30), streaming=RETRIEVAL).run()
    assert cache.owned_blocks == (8, 8)
    runner.free()
    again = Runner(cache, range(30), streaming=RETRIEVAL)
    assert again.match.num_tokens == 28
    assert [len(blocks) for blocks in again.match.blocks] == [7, 7]
    again.run().free()
    assert cache.owned_blocks == (0, 0)


def test_only_the_streaming_group_takes_another_policy() -> None:
    cache = build_cache(
        {"retrieval": RETRIEVAL, "streaming": STREAMING, "sliding-5": SLIDING}, [8, 8, 8]
    )
    assert cache.policies() == (RETRIEVAL, STREAMING, SLIDING)
    assert cache.policies(RETRIEVAL) == (RETRIEVAL, RETRIEVAL, SLIDING)


def test_a_salt_keeps_prefixes_apart_and_the_miss_says_so() -> None:
    cache = build_mixed()
    Runner(cache, range(21), salt="a").run().free()
    for salt in ("", "b"):
        other = Runner(cache, range(21), salt=salt)
        assert other.match.num_tokens == 0
        assert other.match.misses == {"salt": 20, "partial_block": 1}
        other.free()
    assert Runner(cache, range(21), salt="a").match.num_tokens == 20
    assert Runner(cache, [9, *range(20)], salt="b").match.misses["never_seen"] == 20


def test_a_salt_is_not_blamed_for_what_was_lost_under_the_same_salt() -> None:
    cache = build_mixed()
    mine = Runner(cache, range(20), salt="a").run().free()
    Runner(cache, range(20), salt="b").run().free()
    streaming = cache.pools[1]
    streaming.release(streaming.allocate(streaming.num_free))
    match = cache.match(mine.keys, 20)
    assert match.misses == {"window_evicted": 16, "partial_block": 4}
    cache.forget_prefixes()
    assert cache.match(mine.keys, 20).misses == {"retrieval_evicted": 16, "partial_block": 4}


def test_a_match_whose_block_is_gone_is_refused_and_takes_nothing() -> None:
    cache = build_mixed([8, 8])
    runner = Runner(cache, range(20)).run().free()
    match = cache.match(runner.keys, 20)
    held = cache.begin()
    cache.extend(held, 32)
    owned = cache.owned_blocks
    with pytest.raises(ValueError, match="is gone"):
        cache.begin(runner.keys.policies, match)
    assert cache.owned_blocks == owned
    cache.check_integrity()
    # Before, its blocks were another's, with other contents; now they are free.
    cache.free(held)
    with pytest.raises(ValueError, match="is gone"):
        cache.begin(runner.keys.policies, match)


def test_a_match_for_other_policies_is_refused() -> None:
    cache = build_mixed()
    runner = Runner(cache, range(20)).run().free()
    match = cache.match(runner.keys, 20)
    with pytest.raises(ValueError, match="other policies"):
        cache.begin(cache.policies(RETRIEVAL), match)
    cache.check_integrity()


def test_keys_that_do_not_belong_to_the_sequence_are_refused() -> None:
    cache = build_mixed()
    runner = Runner(cache, range(20)).run()
    cache.extend(runner.cache, 4)
    with pytest.raises(ValueError, match="5 keys for 6 full blocks"):
        cache.publish(runner.cache, runner.keys)
    other = cache.keys(cache.policies(RETRIEVAL))
    other.extend(range(24))
    with pytest.raises(ValueError, match="but the tables have"):
        cache.publish(runner.cache, other)
    assert runner.cache.num_published == 5


def test_forks_leave_their_own_ends_to_be_found() -> None:
    cache = build_mixed()
    parent = Runner(cache, range(18)).run()
    child = cache.fork(parent.cache)
    assert child.num_published == parent.cache.num_published == 4
    keys = parent.keys.copy()
    cache.extend(child, 10)
    tokens = [*range(18), *[77] * 10]
    keys.extend(tokens)
    cache.publish(child, keys)
    cache.release_expired(child)
    parent.grow(10).free()
    cache.free(child)
    cache.check_integrity()
    assert cache.match(keys, 28).num_tokens == 24
    assert cache.match(parent.keys, 28).num_tokens == 24


def test_a_sequence_that_lost_its_blocks_finds_them_again() -> None:
    cache = build_mixed()
    runner = Runner(cache, range(18)).run().grow(7).free()
    assert runner.cache.num_tokens == 25
    match = cache.match(runner.keys, 25)
    assert match.num_tokens == 24
    assert cache.begin(runner.keys.policies, match).num_tokens == 24


def test_without_prefix_caching_nothing_is_found_and_nothing_missed() -> None:
    policies = {"retrieval": RETRIEVAL, "streaming": STREAMING}
    with pytest.raises(ValueError, match=r"one block size, got \(4, 2\)"):
        build_cache(policies, [8, 8], [4, 2])
    cache = build_cache(policies, [8, 8], [4, 2], prefix_caching=False)
    runner = Runner(cache, range(10)).run()
    assert cache.cached_blocks == (0, 0)
    runner.free()
    assert cache.cached_blocks == (0, 0)
    match = cache.match(runner.keys, 10)
    assert (match.num_tokens, match.blocks, match.misses) == (0, ((), ()), {})
    assert cache.begin(match=match).num_tokens == 0


def test_a_wider_policy_takes_more_to_fit() -> None:
    cache = build_mixed([20, 8])
    assert cache.fits(80)
    assert not cache.fits(81)
    assert cache.fits(32, cache.policies(RETRIEVAL))
    assert not cache.fits(33, cache.policies(RETRIEVAL))
