"""Which head group has which slab of an arena that the groups share.

a slab is       what is in it                           who may take it
free            nothing                                 any group
used            a block at least that somebody owns     nobody, unless its blocks are moved away
idle            cached blocks, and none that is owned   any group; its cached blocks are forgotten

A group takes blocks from the fullest of its slabs, so that others empty out. It takes a free slab
before it forgets anything. When there is none, what was used longest ago is forgotten, in whichever
group that is. When all slabs are used, but another group's blocks would fit into fewer of them, the
emptiest of these is vacated: its blocks move into the others. So whatever went before, the groups'
owned blocks fit if the slabs that each group's would fill add up to no more than there are: what
nobody can use is less than a slab for each group, and what straddles the ends of slabs.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

from headlong.cache.group_slabs import GroupSlabs
from headlong.kernels.layout import ArenaLayout


def slabs_needed(owned: Iterable[int], sizes: Iterable[int]) -> int:
    """Fewest slabs that hold so many blocks of each group, of which one lends `sizes`."""
    return sum(-(-count // size) for count, size in zip(owned, sizes, strict=True))


class BlockMover(Protocol):
    """Who knows what lies in blocks, and holds them."""

    def settle_blocks(self) -> bool:
        """Wait for all copies on their way to or from blocks.

        Returns:
            Whether an owner of a block has gone by that.
        """
        ...

    def move_blocks(self, group: int, places: Mapping[int, int]) -> None:
        """Take note that blocks lie elsewhere from now on, and copy their contents.

        Args:
            group: Index of the group.
            places: New places by old ones, which are used again after this.
        """
        ...


class SlabTenant(Protocol):
    """A group's pool, as another group knows it that needs a slab."""

    def oldest_idle(self) -> tuple[int, int] | None:
        """When the idle slab was last used that is to go first, and which it is."""
        ...

    def forget_slab(self, slab: int) -> None:
        """Forget what is cached in a slab; if nothing is owned in it, it is free then."""
        ...

    def vacate_slab(self, slab: int) -> Mapping[int, int]:
        """Move the blocks of a slab to others of the group; the slab is free then.

        What of the group was used longest ago is forgotten for that, wherever it lies.

        Returns:
            New places by old ones.
        """
        ...


class Slabs:
    """All slabs of an arena. Bookkeeping only, no memory.

    Args:
        layout: The arena's map.
        mover: Who moves blocks.

    Attributes:
        num_slabs: Slabs of the arena.
        groups: What each group has of them.
        sizes: Blocks of each group that a slab lends.
        num_moved: Blocks moved so far.
    """

    def __init__(self, layout: ArenaLayout, mover: BlockMover) -> None:
        self.num_slabs = layout.num_slabs
        self.groups = tuple(
            GroupSlabs(layout, group, self._give_back) for group in range(layout.num_groups)
        )
        self.sizes = tuple(each.size for each in self.groups)
        self.num_moved = 0
        self._mover = mover
        self._tenants: list[SlabTenant] = []
        # Taken from the end: the first slab first.
        self._free = list(reversed(range(self.num_slabs)))
        self._now = 0

    @property
    def num_free(self) -> int:
        """Slabs that no group has."""
        return len(self._free)

    def join(self, tenants: Iterable[SlabTenant]) -> None:
        """Make the groups' pools known to each other, in the groups' order."""
        self._tenants = list(tenants)

    def tick(self) -> int:
        """The time: events so far, this one included."""
        self._now += 1
        return self._now

    def hold(self, owned: Iterable[int]) -> bool:
        """Whether so many owned blocks of each group fit."""
        return slabs_needed(owned, self.sizes) <= self.num_slabs

    def room(self, group: int) -> int:
        """How many more blocks of one group can be owned, while no other group's are."""
        own = self.groups[group]
        others = sum(each.num_needed for each in self.groups) - own.num_needed
        return (self.num_slabs - others) * own.size - own.num_owned

    def take_free(self, group: int) -> bool:
        """Give a group a free slab; False if there is none."""
        if not self._free:
            return False
        self.groups[group].adopt(self._free.pop())
        return True

    def take_idle(self, group: int, before: float) -> bool:
        """Give a group an idle slab of another, the one that was used longest ago.

        Args:
            group: Who gets it.
            before: Time before which it must have been used last.

        Returns:
            False if there is none.
        """
        owner = None
        slab = 0
        for other, tenant in enumerate(self._tenants):
            oldest = tenant.oldest_idle()
            if other != group and oldest is not None and oldest[0] < before:
                owner = tenant
                before, slab = oldest
        if owner is None:
            return False
        owner.forget_slab(slab)
        return self.take_free(group)

    def vacate(self, group: int) -> None:
        """Give a group a slab by moving another's blocks closer together.

        All slabs must be used, and one more for the group must `hold`. If copies were on their way,
        this may only have waited for them, and there is something else to take by that.
        """
        if self._mover.settle_blocks():
            return
        spare = [
            each for each in self.groups if each.index != group and each.num_slabs > each.num_needed
        ]
        assert spare, "no group can spare a slab"
        chosen = min(spare, key=lambda each: each.emptiest()[1] * each.block_bytes)
        slab, _ = chosen.emptiest()
        moved = self._tenants[chosen.index].vacate_slab(slab)
        self.num_moved += len(moved)
        self._mover.move_blocks(chosen.index, moved)
        self.take_free(group)

    def check_integrity(self) -> None:
        """Prove that every slab is free or one group's.

        Raises:
            AssertionError: One is neither, or both, or a group counts wrongly what is in its own.
        """
        held = [slab for each in self.groups for slab in each.slabs]
        assert sorted([*held, *self._free]) == list(range(self.num_slabs)), (
            f"{len(held)} slabs held and {len(self._free)} free of {self.num_slabs}"
        )
        assert sum(each.num_needed for each in self.groups) <= self.num_slabs
        for each in self.groups:
            each.check_integrity()

    def _give_back(self, slab: int) -> None:
        self._free.append(slab)
