"""The slabs that one head group has, and what is in them.

Here a block is owned, free, or neither: cached.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from headlong.kernels.layout import ArenaLayout


@dataclass(slots=True)
class _Slab:
    """What is in a slab.

    Attributes:
        free: Its free blocks.
        num_owned: Its owned blocks.
        is_kept: Whether a cached block in it is among the kept, or was since it was free.
        is_open: Whether its free blocks can be taken.
    """

    free: list[int] = field(default_factory=list)
    num_owned: int = 0
    is_kept: bool = False
    is_open: bool = True


class GroupSlabs:
    """The slabs of one group.

    Args:
        layout: The arena's map.
        group: Index of the group.
        give_back: Called with a slab that the group has no longer, because it is all free.

    Attributes:
        index: Index of the group.
        size: Blocks that a slab lends.
        block_bytes: Bytes of one.
        num_owned: Blocks that somebody owns.
        num_free: Free blocks in its slabs.
        idle_kept: Idle slabs with blocks among the kept, least recently used first, and when.
        idle_passed: The other idle slabs, likewise.
    """

    def __init__(self, layout: ArenaLayout, group: int, give_back: Callable[[int], None]) -> None:
        self.index = group
        self.size = layout.slab_blocks(group)
        self.block_bytes = layout.block_bytes(group)
        self.num_owned = 0
        self.num_free = 0
        self.idle_kept: OrderedDict[int, int] = OrderedDict()
        self.idle_passed: OrderedDict[int, int] = OrderedDict()
        self._layout = layout
        self._slab_bytes = layout.slab_bytes
        self._give_back = give_back
        self._slabs: dict[int, _Slab] = {}
        # Slabs with free blocks to take, by their owned ones; bit i is set if any has i.
        self._with_free: list[dict[int, None]] = [{} for _ in range(self.size + 1)]
        self._fullness = 0

    @property
    def slabs(self) -> Iterable[int]:
        """The slabs that it has."""
        return self._slabs.keys()

    @property
    def num_slabs(self) -> int:
        """How many it has."""
        return len(self._slabs)

    @property
    def num_needed(self) -> int:
        """Fewest slabs that would hold its owned blocks."""
        return -(-self.num_owned // self.size)

    def blocks_of(self, slab: int) -> range:
        """The blocks that a slab lends."""
        first = self._layout.first_of_slab(self.index, slab)
        return range(first, first + self.size)

    def free_blocks(self) -> list[int]:
        """All free blocks."""
        return [block for slab in self._slabs.values() for block in slab.free]

    def emptiest(self) -> tuple[int, int]:
        """The slab with the fewest owned blocks, and how many."""
        slab = min(self._slabs, key=lambda each: self._slabs[each].num_owned)
        return slab, self._slabs[slab].num_owned

    def adopt(self, slab: int) -> None:
        """Have a slab, all blocks of which are free."""
        # Taken from the end: the first block first.
        free = list(reversed(self.blocks_of(slab)))
        self._slabs[slab] = _Slab(free)
        self.num_free += len(free)
        self._list(slab, 0)

    def take(self, count: int) -> Sequence[int]:
        """Make free blocks owned: up to `count`, those of the fullest slabs first."""
        taken: list[int] = []
        while len(taken) < count and self._fullness:
            fullness = self._fullness.bit_length() - 1
            number = next(reversed(self._with_free[fullness]))
            slab = self._slabs[number]
            missing = count - len(taken)
            own = slab.free[-missing:]
            del slab.free[-missing:]
            own.reverse()
            taken += own
            self._unlist(number, fullness)
            slab.num_owned += len(own)
            self._wake(number)
            if slab.free:
                self._list(number, slab.num_owned)
        self.num_owned += len(taken)
        self.num_free -= len(taken)
        return taken

    def note_owned(self, block: int) -> None:
        """A cached block has an owner."""
        number = self._slab_of(block)
        self.num_owned += 1
        self._set_owned(number, self._slabs[number].num_owned + 1)
        self._wake(number)

    def note_cached(self, block: int, now: int) -> None:
        """An owned block has no owner, but a key."""
        number = self._slab_of(block)
        slab = self._slabs[number]
        self.num_owned -= 1
        self._set_owned(number, slab.num_owned - 1)
        if slab.num_owned == 0:
            self._rest(number, now)

    def note_used(self, block: int, now: int) -> None:
        """A cached block is among the kept from now on."""
        number = self._slab_of(block)
        slab = self._slabs[number]
        slab.is_kept = True
        if number in self.idle_kept or number in self.idle_passed:
            self._wake(number)
            self._rest(number, now)

    def put_back(self, block: int, now: int) -> None:
        """An owned block is free."""
        number = self._slab_of(block)
        slab = self._slabs[number]
        self.num_owned -= 1
        self._set_owned(number, slab.num_owned - 1)
        self._put(number, block)
        if slab.num_owned == 0 and number in self._slabs:
            self._rest(number, now)

    def put_free(self, block: int) -> None:
        """A cached block is free."""
        self._put(self._slab_of(block), block)

    def close(self, slab: int) -> None:
        """Lend no more blocks of a slab."""
        closed = self._slabs[slab]
        if closed.free:
            self._unlist(slab, closed.num_owned)
        closed.is_open = False
        self.num_free -= len(closed.free)

    def leave(self, slab: int) -> None:
        """Give a closed slab back whose owned blocks are elsewhere now."""
        self.num_owned -= self._slabs[slab].num_owned
        self._drop(slab)

    def check_integrity(self) -> None:
        """Prove that what is counted is there.

        Raises:
            AssertionError: It is not.
        """
        slabs = self._slabs.items()
        assert self.num_owned == sum(slab.num_owned for _, slab in slabs)
        assert self.num_free == sum(len(slab.free) for _, slab in slabs)
        idle = {number for number, slab in slabs if slab.num_owned == 0}
        assert idle == {*self.idle_kept, *self.idle_passed}, "idle slabs are not listed as such"
        assert not self.idle_kept.keys() & self.idle_passed.keys()
        for number, slab in slabs:
            assert slab.is_open
            assert len(slab.free) < self.size, f"slab {number} is free and was not given back"
            assert set(slab.free) <= set(self.blocks_of(number)), f"slab {number}: others' blocks"
            for owned, listed in enumerate(self._with_free):
                expected = bool(slab.free) and owned == slab.num_owned
                assert (number in listed) == expected, f"slab {number} is listed under {owned}"
        for owned, listed in enumerate(self._with_free):
            assert bool(listed) == bool(self._fullness >> owned & 1)

    def _slab_of(self, block: int) -> int:
        return block * self.block_bytes // self._slab_bytes

    def _put(self, number: int, block: int) -> None:
        slab = self._slabs[number]
        if not slab.free:
            self._list(number, slab.num_owned)
        slab.free.append(block)
        self.num_free += 1
        if len(slab.free) == self.size:
            self._unlist(number, 0)
            self.num_free -= self.size
            self._drop(number)

    def _drop(self, number: int) -> None:
        self._wake(number)
        del self._slabs[number]
        self._give_back(number)

    def _set_owned(self, number: int, count: int) -> None:
        slab = self._slabs[number]
        if slab.free:
            self._unlist(number, slab.num_owned)
            self._list(number, count)
        slab.num_owned = count

    def _list(self, number: int, num_owned: int) -> None:
        self._with_free[num_owned][number] = None
        self._fullness |= 1 << num_owned

    def _unlist(self, number: int, num_owned: int) -> None:
        listed = self._with_free[num_owned]
        del listed[number]
        if not listed:
            self._fullness &= ~(1 << num_owned)

    def _wake(self, number: int) -> None:
        """Take a slab from the idle ones, if it is one."""
        if self.idle_kept.pop(number, None) is None:
            self.idle_passed.pop(number, None)

    def _rest(self, number: int, now: int) -> None:
        """Put a slab among the idle ones."""
        (self.idle_kept if self._slabs[number].is_kept else self.idle_passed)[number] = now
