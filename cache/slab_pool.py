"""The blocks of a head group that shares the arena with others."""

import math
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping

from headlong.cache.block_pool import BlockPool
from headlong.cache.slabs import Slabs

EVICTED_AT_ONCE = 16
"""Most blocks that a group forgets of its own before it looks again whether others' are older."""


class SlabPool(BlockPool):
    """As `BlockPool`, with blocks of slabs that the group takes and gives back.

    Ids are those of blocks all over the arena; what is not in one of its slabs is nobody's here.
    The passed may be a quarter of all these, and not of what the group happens to have: one that
    lost slabs would else forget the windows that prefixes are found by, and lose more.

    Args:
        slabs: All slabs.
        group: Index of the group.
        num_blocks: Ids are 0 to num_blocks - 1.
    """

    def __init__(self, slabs: Slabs, group: int, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._free.clear()
        self._slabs = slabs
        self._group = group
        self._own = slabs.groups[group]

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out while no other group takes any."""
        return self._slabs.room(self._group)

    @property
    def num_owned(self) -> int:
        """Blocks that somebody owns, each counted once."""
        return self._own.num_owned

    def oldest_idle(self) -> tuple[int, int] | None:
        """As `SlabTenant.oldest_idle`."""
        own = self._own
        passed_first = own.idle_passed and (self._too_many_passed or not own.idle_kept)
        idle = own.idle_passed if passed_first else own.idle_kept
        if not idle:
            return None
        slab, last_used = next(iter(idle.items()))
        return (0 if passed_first and self._too_many_passed else last_used), slab

    def forget_slab(self, slab: int) -> None:
        """As `SlabTenant.forget_slab`."""
        for block in self._own.blocks_of(slab):
            if self._counts[block] == 0 and self._keys[block] is not None:
                self._forget(block)
                self._put_free(block)

    def vacate_slab(self, slab: int) -> Mapping[int, int]:
        """As `SlabTenant.vacate_slab`."""
        self._own.close(slab)
        blocks = self._own.blocks_of(slab)
        left = {each for each in blocks if self._counts[each] or self._keys[each] is not None}
        while self._own.num_free < len(left):
            block = self._evict()
            if block in left:
                left.remove(block)
            else:
                self._put_free(block)
        places = dict(zip(sorted(left), self._own.take(len(left)), strict=True))
        cached = [each for each in left if not self._counts[each]]
        for block, place in places.items():
            self._rename(block, place)
        self._kept, self._passed = [
            OrderedDict((places.get(block, block), since) for block, since in queue.items())
            for queue in (self._kept, self._passed)
        ]
        for block in cached:
            place = places[block]
            queue = self._kept if place in self._kept else self._passed
            if queue is self._kept:
                self._own.note_used(place, queue[place])
            self._own.note_cached(place, queue[place])
        self._own.leave(slab)
        return places

    def _rename(self, block: int, place: int) -> None:
        self._counts[place], self._counts[block] = self._counts[block], 0
        key = self._keys[block]
        if key is not None:
            self._found[key] = place
        self._keys[place], self._keys[block] = key, None
        if block in self._was_found:
            self._was_found.remove(block)
            self._was_found.add(place)

    def _free_blocks(self) -> Iterable[int]:
        return self._own.free_blocks()

    def _lent_blocks(self) -> Collection[int]:
        return [block for slab in self._own.slabs for block in self._own.blocks_of(slab)]

    def _take(self, count: int) -> list[int]:
        blocks = list(self._own.take(count))
        while len(blocks) < count:
            self._grow(count - len(blocks))
            blocks += self._own.take(count - len(blocks))
        return blocks

    def _grow(self, wanted: int) -> None:
        """Come closer to free blocks, of which so many are wanted."""
        if self._slabs.take_free(self._group):
            return
        if self.num_cached:
            if not self._slabs.take_idle(self._group, self._oldest_cached()):
                for _ in range(min(wanted, self.num_cached, EVICTED_AT_ONCE)):
                    self._put_free(self._evict())
        elif not self._slabs.take_idle(self._group, math.inf):
            self._slabs.vacate(self._group)

    def _oldest_cached(self) -> int:
        """Since when the block that is to be evicted first is cached."""
        if self._evicts_passed:
            return 0 if self._too_many_passed else next(iter(self._passed.values()))
        return next(iter(self._kept.values()))

    def _put_back(self, block: int) -> None:
        self._own.put_back(block, self._slabs.tick())

    def _put_free(self, block: int) -> None:
        self._own.put_free(block)

    def _note_owned(self, block: int) -> None:
        self._own.note_owned(block)

    def _note_unowned(self, block: int) -> None:
        self._own.note_cached(block, self._slabs.tick())

    def _cache(self, block: int, *, kept: bool) -> None:
        now = self._slabs.tick()
        (self._kept if kept else self._passed)[block] = now
        if kept:
            self._own.note_used(block, now)
