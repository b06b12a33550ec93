from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from headlong.cache.host_tier import HostTier, Slot

KEYS = [bytes([index]) * 32 for index in range(40)]


def put(tier: HostTier, group: int, key: bytes, *, passed: bool = False) -> Slot:
    slot = tier.reserve(group)
    assert slot is not None
    tier.fill(slot, key, passed=passed)
    tier.unpin(slot)
    return slot


def held(tier: HostTier, group: int) -> Iterator[int]:
    return (index for index, key in enumerate(KEYS) if tier.has(group, key))


def test_what_was_used_longest_ago_goes_first() -> None:
    forgotten: list[bytes | None] = []
    tier = HostTier(4 * 64, [64], lambda slot: forgotten.append(slot.key))
    slots = [put(tier, 0, key) for key in KEYS[:4]]
    tier.touch(slots[0])
    put(tier, 0, KEYS[4])
    assert forgotten == [KEYS[1]]
    assert list(held(tier, 0)) == [0, 2, 3, 4]
    assert tier.held_bytes == 4 * 64
    tier.check_integrity(0)


def test_what_is_pinned_stays() -> None:
    tier = HostTier(3 * 64, [64])
    slots = [put(tier, 0, key) for key in KEYS[:3]]
    for slot in slots[:2]:
        tier.pin(slot)
    put(tier, 0, KEYS[3])
    assert list(held(tier, 0)) == [0, 1, 3]
    last = tier.find(0, KEYS[3])
    assert last is not None
    tier.pin(last)
    assert tier.reserve(0) is None
    tier.check_integrity(3)


def test_passed_blocks_keep_to_a_quarter_of_the_room() -> None:
    tier = HostTier(8 * 64, [64])
    for key in KEYS[:4]:
        put(tier, 0, key)
    for key in KEYS[4:8]:
        put(tier, 0, key, passed=True)
    put(tier, 0, KEYS[8])
    put(tier, 0, KEYS[9])
    assert list(held(tier, 0)) == [0, 1, 2, 3, 6, 7, 8, 9]
    put(tier, 0, KEYS[10])
    assert list(held(tier, 0)) == [1, 2, 3, 6, 7, 8, 9, 10], "two of eight may stay"
    assert not tier.is_roomy(0, passed=False)


def test_a_passed_block_that_is_found_is_kept() -> None:
    tier = HostTier(4 * 64, [64])
    slots = [put(tier, 0, key, passed=True) for key in KEYS[:4]]
    tier.keep(slots[0])
    for key in KEYS[4:6]:
        put(tier, 0, key)
    assert list(held(tier, 0)) == [0, 3, 4, 5]


def test_a_group_gets_the_room_of_another() -> None:
    tier = HostTier(64 * 300, [100, 300])
    for key in KEYS:
        put(tier, 0, key)
    small = tier.held_bytes
    for key in KEYS:
        put(tier, 1, key)
    assert list(held(tier, 1)) == list(range(40))
    assert list(held(tier, 0)) == list(range(40)), "there was room for both"
    many = [bytes([index, 255]) * 16 for index in range(100)]
    for key in many:
        put(tier, 1, key)
    assert tier.held_bytes <= 64 * 300
    assert not any(held(tier, 0)), "all that was older went"
    assert small == 4000
    tier.check_integrity(0)


def test_nothing_is_left_after_clearing() -> None:
    tier = HostTier(4 * 64, [64])
    slots = [put(tier, 0, key) for key in KEYS[:3]]
    tier.pin(slots[0])
    tier.clear()
    assert not any(held(tier, 0))
    assert tier.held_bytes == 0
    tier.check_integrity(1)
    tier.unpin(slots[0])
    tier.check_integrity(0)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="do not hold"):
        HostTier(199, [100, 50])
    tier = HostTier(200, [100, 50])
    slot = put(tier, 1, KEYS[0])
    with pytest.raises(ValueError, match="not reserved"):
        tier.fill(slot, KEYS[1])
    with pytest.raises(ValueError, match="not pinned"):
        tier.unpin(slot)
    other = tier.reserve(1)
    assert other is not None
    with pytest.raises(ValueError, match="another slot"):
        tier.fill(other, KEYS[0])
    tier.unpin(other)
    with pytest.raises(ValueError, match="free"):
        tier.pin(other)


class HostMachine(RuleBasedStateMachine):
    """Blocks of three sizes come and go; none overlaps another, and none that is pinned goes."""

    @initialize(
        sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3), num_bytes=st.integers(27, 400)
    )
    def start(self, sizes: list[int], num_bytes: int) -> None:
        self.sizes = sizes
        self.tier = HostTier(num_bytes, sizes)
        self.num_bytes = num_bytes
        self.pinned: list[Slot] = []

    @rule(group=st.integers(0, 2), key=st.sampled_from(KEYS[:12]), passed=st.booleans())
    def put(self, group: int, key: bytes, passed: bool) -> None:
        group %= len(self.sizes)
        slot = self.tier.find(group, key)
        if slot is not None:
            self.tier.touch(slot)
            return
        slot = self.tier.reserve(group)
        if slot is None:
            assert self.pinned
            return
        self.tier.fill(slot, key, passed=passed)
        self.pinned.append(slot)

    @rule(group=st.integers(0, 2), key=st.sampled_from(KEYS[:12]))
    def pin(self, group: int, key: bytes) -> None:
        slot = self.tier.find(group % len(self.sizes), key)
        if slot is not None:
            self.tier.pin(slot)
            self.tier.keep(slot)
            self.pinned.append(slot)

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        if self.pinned:
            index = data.draw(st.integers(0, len(self.pinned) - 1))
            self.tier.unpin(self.pinned.pop(index))

    @rule(really=st.sampled_from([False] * 9 + [True]))
    def clear(self, really: bool) -> None:
        if really:
            self.tier.clear()

    @invariant()
    def whole(self) -> None:
        self.tier.check_integrity(len(self.pinned))
        slots = sorted({*self.tier._slots.values(), *self.pinned}, key=lambda each: each.offset)
        ends = [slot.offset + self.sizes[slot.group] for slot in slots]
        assert all(end <= slot.offset for end, slot in zip(ends[:-1], slots[1:], strict=True))
        assert not ends or ends[-1] <= self.num_bytes


HostMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHostTier = HostMachine.TestCase
