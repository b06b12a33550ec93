"""Whether there is room for one more, however far all of them go."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.cache.prefix_keys import PrefixKeys
from headlong.cache.reservation import Reservation
from headlong.cache.sequence_cache import SequenceCache
from support.caches import build_cache

STREAMING = HeadPolicy(sink_size=3, window_size=6)


def build_mixed(num_blocks: Sequence[int]) -> KVCache:
    return build_cache({"retrieval": RETRIEVAL, "streaming": STREAMING}, num_blocks)


@dataclass(eq=False)
class Run:
    """A sequence, and the length that was promised for it."""

    kv: KVCache
    keys: PrefixKeys
    tokens: list[int]
    length: int
    cache: SequenceCache
    forks: int = 0
    fork_tokens: int = 0
    # What it writes itself differs from what all others do.
    own_token: int = field(default_factory=count(1000).__next__)

    @property
    def reservation(self) -> Reservation:
        return Reservation(
            self.cache.policies,
            self.length,
            self.cache,
            forks=self.forks,
            fork_tokens=self.fork_tokens,
        )

    def extend(self, num_tokens: int) -> None:
        self.kv.extend(self.cache, num_tokens)
        missing = self.cache.num_tokens - len(self.tokens)
        self.tokens += [self.own_token] * missing

    def settle(self) -> None:
        self.keys.extend(self.tokens)
        self.kv.publish(self.cache, self.keys)
        self.kv.release_expired(self.cache)

    def fork(self) -> "Run":
        cache = self.kv.fork(self.cache)
        return Run(self.kv, self.keys.copy(), self.tokens.copy(), self.length, cache)


def start(kv: KVCache, tokens: list[int], length: int, streaming: HeadPolicy | None = None) -> Run:
    keys = kv.keys(kv.policies(streaming))
    keys.extend(tokens)
    cache = kv.begin(keys.policies, kv.match(keys, len(tokens)))
    return Run(kv, keys, tokens.copy(), length, cache)


def run_all(kv: KVCache, runs: list[Run]) -> None:
    """A token of each a step, all of them before any window moves, and none is freed."""
    while True:
        for run in list(runs):
            while run.forks and run.cache.num_tokens == run.fork_tokens:
                run.forks -= 1
                runs.append(run.fork())
        going = [run for run in runs if run.cache.num_tokens < run.length]
        if not going:
            return
        for run in going:
            run.extend(1)
        for run in going:
            run.settle()
        kv.check_integrity()


def test_what_a_match_shares_with_a_running_sequence_costs_nothing() -> None:
    cache = build_mixed([12, 64])
    held = start(cache, list(range(32)), 32)
    held.extend(32)
    held.settle()
    wanted = cache.keys(cache.policies())
    wanted.extend(range(40))
    match = cache.match(wanted, 40)
    assert match.num_tokens == 32
    new = Reservation(wanted.policies, 48, match=match)
    assert cache.has_room(new, [held.reservation])
    assert not cache.has_room(Reservation(wanted.policies, 49, match=match), [held.reservation])
    assert not cache.has_room(Reservation(wanted.policies, 17), [held.reservation])


def test_what_a_match_takes_from_the_cached_is_paid_for() -> None:
    cache = build_mixed([12, 64])
    gone = start(cache, list(range(32)), 32)
    gone.extend(32)
    gone.settle()
    cache.free(gone.cache)
    wanted = cache.keys(cache.policies())
    wanted.extend(range(40))
    match = cache.match(wanted, 40)
    assert match.num_tokens == 32
    assert cache.has_room(Reservation(wanted.policies, 48, match=match), [])
    assert not cache.has_room(Reservation(wanted.policies, 49, match=match), [])


def test_a_shared_window_is_replaced_by_each_of_its_holders() -> None:
    # Sink block and window take 1 + 3 blocks of each at most; the sink block is shared.
    step = STREAMING.step_blocks(100, 4)
    assert step == 4
    for num_blocks, has_room in ((2 * step - 1, True), (2 * step - 2, False)):
        cache = build_mixed([64, num_blocks])
        held = start(cache, list(range(20)), 100)
        held.extend(20)
        held.settle()
        wanted = cache.keys(cache.policies())
        wanted.extend(range(22))
        match = cache.match(wanted, 22)
        assert match.num_tokens == 20
        new = Reservation(wanted.policies, 100, match=match)
        assert cache.has_room(new, [held.reservation]) == has_room
        if has_room:
            run_all(cache, [held, start(cache, list(range(22)), 100)])


def test_a_policy_of_its_own_decides_what_a_sequence_needs() -> None:
    cache = build_mixed([64, 24])
    full = cache.policies(RETRIEVAL)
    assert cache.has_room(Reservation(full, 96), [])
    assert not cache.has_room(Reservation(full, 97), [])
    held = start(cache, [], 80, streaming=RETRIEVAL)
    held.extend(8)
    assert cache.has_room(Reservation(cache.policies(), 100), [held.reservation])
    assert not cache.has_room(Reservation(full, 20), [held.reservation])
    assert cache.has_room(Reservation(full, 16), [held.reservation])


def test_forks_share_full_blocks_and_need_their_own_of_the_rest() -> None:
    cache = build_mixed([9, 64])
    # 10 tokens: two full blocks that all share. To 20 tokens each needs 3 blocks more.
    new = Reservation(cache.policies(), 20, forks=1, fork_tokens=10)
    assert not cache.has_room(Reservation(cache.policies(), 21, forks=1, fork_tokens=10), [])
    assert cache.has_room(new, [])
    assert not cache.has_room(Reservation(cache.policies(), 20, forks=2, fork_tokens=10), [])
    assert cache.has_room(Reservation(cache.policies(), 12, forks=6, fork_tokens=10), [])
    assert not cache.has_room(Reservation(cache.policies(), 12, forks=7, fork_tokens=10), [])


def test_a_sequence_without_a_reservation_keeps_what_it_has() -> None:
    cache = build_mixed([10, 10])
    other = cache.begin()
    cache.extend(other, 16)
    assert cache.has_room(Reservation(cache.policies(), 24), [])
    assert not cache.has_room(Reservation(cache.policies(), 25), [])
    # Of 16 tokens it holds all 4 streaming blocks, as no window has moved yet.
    for num_streaming, has_room in ((8, True), (7, False)):
        cache = build_mixed([20, num_streaming])
        cache.extend(cache.begin(), 16)
        assert cache.has_room(Reservation(cache.policies(), 24), []) == has_room


POLICIES = st.builds(HeadPolicy, st.integers(0, 7), st.integers(1, 14))


@settings(max_examples=300, deadline=None)
@given(
    streaming=POLICIES,
    wide=POLICIES | st.just(RETRIEVAL),
    sliding=POLICIES,
    block_size=st.integers(1, 4),
    num_blocks=st.tuples(*[st.integers(12, 70)] * 3),
    data=st.data(),
)
def test_where_there_is_room_nobody_ever_lacks_a_block(
    streaming: HeadPolicy,
    wide: HeadPolicy,
    sliding: HeadPolicy,
    block_size: int,
    num_blocks: tuple[int, int, int],
    data: st.DataObject,
) -> None:
    groups = {"retrieval": RETRIEVAL, "streaming": streaming, "sliding": sliding}
    cache = build_cache(groups, num_blocks, block_size)
    stems = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=2))
    runs: list[Run] = []
    num_admitted = 0
    for number in range(6):
        stem = data.draw(st.integers(0, len(stems) - 1))
        prompt = [stem] * stems[stem] + [-number] * data.draw(st.integers(1, 6))
        length = len(prompt) + data.draw(st.integers(0, 20))
        forks = data.draw(st.integers(0, 2))
        keys = cache.keys(cache.policies(wide if data.draw(st.booleans()) else None))
        keys.extend(prompt)
        match = cache.match(keys, len(prompt))
        wanted = Reservation(keys.policies, length, None, match, forks, len(prompt))
        if not cache.has_room(wanted, [run.reservation for run in runs]):
            continue
        num_admitted += 1
        run = Run(cache, keys, prompt, length, cache.begin(keys.policies, match))
        run.forks, run.fork_tokens = forks, len(prompt)
        runs.append(run)
        # Some are in the middle when the next one comes, and some are gone.
        part = data.draw(st.integers(0, len(prompt) - run.cache.num_tokens))
        for _ in range(part):
            run.extend(1)
            run.settle()
        if not run.forks and data.draw(st.integers(0, 4)) == 0:
            runs.remove(run)
            cache.free(run.cache)
        cache.check_integrity()
    event(f"{num_admitted} admitted")
    run_all(cache, runs)
    for run in runs:
        cache.free(run.cache)
    cache.check_integrity()
    assert cache.owned_blocks == (0, 0, 0)


@pytest.mark.parametrize("streaming", [STREAMING, HeadPolicy(0, 1), HeadPolicy(8, 8)])
def test_as_many_are_admitted_as_the_windows_were_sized_for(streaming: HeadPolicy) -> None:
    size = 8 * streaming.step_blocks(1000, 4)
    cache = build_cache({"retrieval": RETRIEVAL, "streaming": streaming}, [2000, size])
    held: list[Reservation] = []
    for _ in range(8):
        assert cache.has_room(Reservation(cache.policies(), 1000), held)
        sequence = cache.begin()
        cache.extend(sequence, 1)
        held.append(Reservation(cache.policies(), 1000, sequence))
    assert not cache.has_room(Reservation(cache.policies(), 1000), held)
