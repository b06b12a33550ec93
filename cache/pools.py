"""The blocks of all groups, and whether so many of them fit."""

from collections.abc import Iterable, Sequence

from headlong.cache.block_pool import BlockPool
from headlong.cache.groups import HeadGroup
from headlong.cache.slab_pool import SlabPool
from headlong.cache.slabs import BlockMover, Slabs
from headlong.kernels.layout import ArenaLayout


class Pools:
    """One pool a group: each with its region of the arena, or all in slabs of one.

    Args:
        layout: The arena's map.
        mover: Who moves blocks.

    Attributes:
        groups: The pools.
        slabs: What they share; None if each has its region.
    """

    groups: tuple[BlockPool, ...]
    slabs: Slabs | None

    def __init__(self, layout: ArenaLayout, mover: BlockMover) -> None:
        if layout.slab_bytes:
            self.slabs = Slabs(layout, mover)
            pools = tuple(
                SlabPool(self.slabs, group, count) for group, count in enumerate(layout.num_blocks)
            )
            self.slabs.join(pools)
            self.groups = pools
        else:
            self.slabs = None
            self.groups = tuple(map(BlockPool, layout.num_blocks))

    def hold(self, owned: Sequence[int]) -> bool:
        """Whether so many owned blocks of each group fit."""
        if self.slabs is not None:
            return self.slabs.hold(owned)
        return all(count <= pool.num_blocks for count, pool in zip(owned, self.groups, strict=True))

    def have(self, more: Sequence[int]) -> bool:
        """Whether so many blocks of each group can be handed out."""
        return not any(more) or self.hold(
            [pool.num_owned + count for pool, count in zip(self.groups, more, strict=True)]
        )

    def explain(self, more: Sequence[int], groups: Sequence[HeadGroup]) -> str:
        """Why so many blocks of each group cannot be handed out."""
        for count, pool, group in zip(more, self.groups, groups, strict=True):
            if count > pool.num_free:
                return f"{count} {group.name} blocks asked for, {pool.num_free} free"
        asked = ", ".join(f"{count} {each.name}" for count, each in zip(more, groups, strict=True))
        return f"{asked} blocks asked for, and the slabs do not hold all of them"

    @property
    def free_blocks(self) -> tuple[int, ...]:
        """Of each group, blocks that it could take and that hold nothing of its own."""
        return tuple(pool.num_free - pool.num_cached for pool in self.groups)

    @property
    def num_moved(self) -> int:
        """Blocks moved so far."""
        return 0 if self.slabs is None else self.slabs.num_moved

    def check_integrity(self, held: Iterable[Iterable[int]]) -> None:
        """Prove that every block is free, cached or owned, and every slab free or one group's.

        Args:
            held: For each group the blocks of every table, a shared block once for each.

        Raises:
            AssertionError: One is not.
        """
        for pool, blocks in zip(self.groups, held, strict=True):
            pool.check_integrity(blocks)
        if self.slabs is not None:
            self.slabs.check_integrity()
