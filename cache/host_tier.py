"""Which blocks the host's memory holds, and which of them go first. Bookkeeping only, no memory.

The buffer is cut into equal slabs. A slab belongs to one head group at a time, which cuts it into
slots of its own block size; one that has no slot left takes a free slab, or the slab of the entry
that was used longest ago. So groups share the buffer by use, and no mix of sizes fragments it.

a slot is       it has a key        pins                where it stands
free            no                  0                   among the free ones of its group
reserved        not yet             1                   nowhere
held            yes                 0                   among the passed or the kept, least recently
                                                        used first
busy            yes                 1 or more           nowhere: its bytes are on their way

As in the arena, passed blocks are forgotten first while they take more than a quarter of the room.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

PASSED_SHARE = 4
"""Passed blocks are forgotten first while they take more than one in so many bytes."""

SLABS = 64
"""Slabs of a buffer that is large enough for so many."""

OnForget = Callable[["Slot"], None]


class Slot:
    """Room for one block of a group.

    Attributes:
        group: Index of the head group.
        slab: Which slab it is in.
        offset: Byte of the buffer where it begins.
        key: Of the block that it holds; None if it holds none.
        passed: Whether a window left its block, and nobody has found it since.
        pins: How many need it to stay.
        used: When it was used last, by a clock that counts uses.
    """

    __slots__ = ("group", "key", "offset", "passed", "pins", "slab", "used")

    def __init__(self, group: int, slab: int, offset: int) -> None:
        self.group = group
        self.slab = slab
        self.offset = offset
        self.key: bytes | None = None
        self.passed = False
        self.pins = 0
        self.used = 0


class HostTier:
    """Keys and slots of a buffer.

    Args:
        num_bytes: Size of the buffer.
        block_bytes: Bytes of a block of each group.
        on_forget: Called with a slot before what it holds is forgotten to make room.

    Attributes:
        num_bytes: Size of the buffer.
        block_bytes: Bytes of a block of each group.
        held_bytes: Bytes of all blocks that can be found.

    Raises:
        ValueError: The buffer does not hold a block of every group at once.
    """

    def __init__(
        self, num_bytes: int, block_bytes: Sequence[int], on_forget: OnForget | None = None
    ) -> None:
        largest = max(block_bytes)
        slab_bytes = max(largest, num_bytes // SLABS)
        if num_bytes // slab_bytes < len(block_bytes):
            raise ValueError(
                f"{num_bytes} bytes do not hold {len(block_bytes)} blocks of {largest} bytes"
            )
        self.num_bytes = num_bytes
        self.block_bytes = tuple(block_bytes)
        self.held_bytes = 0
        self.on_forget = on_forget
        self._slab_bytes = slab_bytes
        self._slabs: list[list[Slot]] = [[] for _ in range(num_bytes // slab_bytes)]
        # Slots of each slab that are pinned.
        self._num_pinned = [0] * len(self._slabs)
        self._free_slabs = list(reversed(range(len(self._slabs))))
        self._free: list[OrderedDict[Slot, None]] = [OrderedDict() for _ in block_bytes]
        self._kept: list[OrderedDict[Slot, None]] = [OrderedDict() for _ in block_bytes]
        self._passed: list[OrderedDict[Slot, None]] = [OrderedDict() for _ in block_bytes]
        self._passed_bytes = 0
        self._slots: dict[tuple[int, bytes], Slot] = {}
        self._clock = 0

    def find(self, group: int, key: bytes) -> Slot | None:
        """The slot that holds a group's block, or is about to."""
        return self._slots.get((group, key))

    def has(self, group: int, key: bytes) -> bool:
        """Whether a slot holds a group's block, or is about to."""
        return (group, key) in self._slots

    def is_roomy(self, group: int, *, passed: bool) -> bool:
        """Whether a block of a group finds room without another being forgotten, now or soon."""
        if passed and self._passed_bytes * PASSED_SHARE > self.num_bytes:
            return False
        return bool(self._free[group] or self._free_slabs)

    def reserve(self, group: int) -> Slot | None:
        """Take a slot, pinned once; what was used longest ago is forgotten for it.

        Returns:
            None if everything that could make room is pinned.
        """
        if not self._free[group] and not self._make_room(group):
            return None
        slot, _ = self._free[group].popitem(last=False)
        self._num_pinned[slot.slab] += 1
        slot.pins = 1
        return slot

    def fill(self, slot: Slot, key: bytes, *, passed: bool = False) -> None:
        """Let a reserved slot be found.

        Args:
            slot: Which.
            key: Of the block that it holds, or is about to.
            passed: Whether a window left the block, and nobody has found it since.

        Raises:
            ValueError: The slot is not reserved, or another one has the key.
        """
        if slot.key is not None or slot.pins == 0:
            raise ValueError("the slot is not reserved")
        if (slot.group, key) in self._slots:
            raise ValueError("another slot holds that block")
        slot.key = key
        slot.passed = passed
        self._slots[slot.group, key] = slot
        self.held_bytes += self.block_bytes[slot.group]

    def pin(self, slot: Slot) -> None:
        """Keep a slot until it is unpinned as often.

        Raises:
            ValueError: It is free.
        """
        if slot.pins == 0:
            if slot.key is None:
                raise ValueError("a free slot cannot be pinned")
            self._take_out(slot)
            self._num_pinned[slot.slab] += 1
        slot.pins += 1

    def unpin(self, slot: Slot) -> None:
        """Take a pin away. Without pins a slot that holds a block was used just now.

        Raises:
            ValueError: It has no pin.
        """
        if slot.pins == 0:
            raise ValueError("the slot is not pinned")
        slot.pins -= 1
        if slot.pins:
            return
        self._num_pinned[slot.slab] -= 1
        if slot.key is None:
            self._free[slot.group][slot] = None
        else:
            self._use(slot)

    def touch(self, slot: Slot) -> None:
        """Make a slot that holds a block the last one to be forgotten of its kind."""
        if slot.pins == 0:
            self._take_out(slot)
            self._use(slot)

    def keep(self, slot: Slot) -> None:
        """Note that a slot's block was found: it is not passed any more."""
        pinned = slot.pins > 0
        if not pinned:
            self._take_out(slot)
        slot.passed = False
        if not pinned:
            self._use(slot)

    def clear(self) -> None:
        """Forget every block; a slot that is pinned becomes free when it no longer is."""
        for slot in list(self._slots.values()):
            self._empty(slot)
            if slot.pins == 0:
                self._free[slot.group][slot] = None

    def _use(self, slot: Slot) -> None:
        self._clock += 1
        slot.used = self._clock
        if slot.passed:
            self._passed[slot.group][slot] = None
            self._passed_bytes += self.block_bytes[slot.group]
        else:
            self._kept[slot.group][slot] = None

    def _take_out(self, slot: Slot) -> None:
        """Take a slot that is held out of its queue."""
        if slot.passed:
            del self._passed[slot.group][slot]
            self._passed_bytes -= self.block_bytes[slot.group]
        else:
            del self._kept[slot.group][slot]

    def _empty(self, slot: Slot) -> None:
        """Take a slot's key away."""
        assert slot.key is not None
        del self._slots[slot.group, slot.key]
        self.held_bytes -= self.block_bytes[slot.group]
        if slot.pins == 0:
            self._take_out(slot)
        slot.key = None

    def _forget(self, slot: Slot) -> None:
        if self.on_forget is not None:
            self.on_forget(slot)
        self._empty(slot)
        self._free[slot.group][slot] = None

    def _make_room(self, group: int) -> bool:
        """Find a free slot for a group, which has none."""
        if self._free_slabs:
            self._give_slab(self._free_slabs.pop(), group)
            return True
        queues = [self._kept, self._passed]
        if self._passed_bytes * PASSED_SHARE > self.num_bytes:
            queues.reverse()
        for queue in queues:
            first = [next(iter(held), None) for held in queue]
            oldest = min((slot for slot in first if slot), key=lambda slot: slot.used, default=None)
            if oldest is not None and oldest.group != group:
                if self._take_slab(oldest.slab, group):
                    return True
                oldest = first[group]
            if oldest is not None:
                self._forget(oldest)
                return True
        # Slabs of free slots alone, or of blocks that are held but not the oldest.
        return any(
            slots and slots[0].group != group and self._take_slab(slab, group)
            for slab, slots in enumerate(self._slabs)
        )

    def _take_slab(self, slab: int, group: int) -> bool:
        """Give another group's slab to a group; False if something in it is pinned."""
        if self._num_pinned[slab]:
            return False
        for slot in self._slabs[slab]:
            if slot.key is not None:
                self._forget(slot)
            del self._free[slot.group][slot]
        self._give_slab(slab, group)
        return True

    def _give_slab(self, slab: int, group: int) -> None:
        start = slab * self._slab_bytes
        size = self.block_bytes[group]
        self._slabs[slab] = [
            Slot(group, slab, start + index * size) for index in range(self._slab_bytes // size)
        ]
        self._free[group].update(dict.fromkeys(self._slabs[slab]))

    def check_integrity(self, pins: int) -> None:
        """Prove that every slot is free, reserved, held or busy, and that none overlap.

        Args:
            pins: Pins that others hold, in all.

        Raises:
            AssertionError: A slot leaked, or is found under a wrong key.
        """
        everything = [slot for slots in self._slabs for slot in slots]
        for slot in everything:
            free = slot in self._free[slot.group]
            kept, passed = slot in self._kept[slot.group], slot in self._passed[slot.group]
            held = kept or passed
            assert not (kept and passed), f"slot {slot.offset}: kept and passed"
            assert free == (slot.pins == 0 and slot.key is None), f"slot {slot.offset}: free"
            assert held == (slot.pins == 0 and slot.key is not None), f"slot {slot.offset}: held"
            if slot.key is not None:
                assert self._slots.get((slot.group, slot.key)) is slot, f"slot {slot.offset} lost"
            size = self.block_bytes[slot.group]
            start = slot.slab * self._slab_bytes
            assert start <= slot.offset <= start + self._slab_bytes - size
        named = [slot for slot in everything if slot.key is not None]
        assert len(named) == len(self._slots), "a key without a slot"
        assert self.held_bytes == sum(self.block_bytes[slot.group] for slot in named)
        queued = sum(map(len, [*self._free, *self._kept, *self._passed]))
        assert queued == sum(slot.pins == 0 for slot in everything), "a slot of an earlier slab"
        assert self._passed_bytes == sum(
            self.block_bytes[slot.group] for queue in self._passed for slot in queue
        )
        assert sum(slot.pins for slot in everything) == pins, "pins leaked"
        assert self._num_pinned == [sum(slot.pins > 0 for slot in slots) for slots in self._slabs]
        assert len(self._free_slabs) == sum(not slots for slots in self._slabs)
