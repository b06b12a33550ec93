"""Who owns a group's blocks.

a block is      reference count     where it stands
free            0                   in the free queue
owned           1 or more           in that many block tables
"""

from collections import Counter, deque
from collections.abc import Iterable


class OutOfBlocksError(Exception):
    """The pool has fewer free blocks than were asked for; nothing was taken."""


class BlockPool:
    """Reference counts over the blocks of one head group. Bookkeeping only, no memory.

    Args:
        num_blocks: Blocks of the group; ids are 0 to num_blocks - 1.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    @property
    def num_owned(self) -> int:
        """Blocks that somebody owns, each counted once."""
        return self.num_blocks - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take free blocks; each starts with one owner.

        Raises:
            OutOfBlocksError: Fewer than `count` are free.
        """
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks asked for, {len(self._free)} free")
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._counts[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to blocks that have one.

        Raises:
            ValueError: A block is free; nothing was changed.
        """
        blocks = self._owned(blocks)
        for block in blocks:
            self._counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Take an owner away; a block without one is free again.

        Raises:
            ValueError: A block is free already; nothing was changed.
        """
        blocks = self._owned(blocks)
        for block in blocks:
            self._counts[block] -= 1
            if self._counts[block] == 0:
                self._free.append(block)

    def _owned(self, blocks: Iterable[int]) -> list[int]:
        blocks = list(blocks)
        for block in blocks:
            if self._counts[block] == 0:
                raise ValueError(f"block {block} is free and cannot be shared or released")
        return blocks

    def check_integrity(self, held: Iterable[int]) -> None:
        """Prove that every block is free or owned, and owned by exactly its holders.

        Args:
            held: The blocks of every table, a shared block once for each.

        Raises:
            AssertionError: A block leaked, or is counted wrongly.
        """
        holders = Counter(held)
        free = Counter(self._free)
        for block, count in enumerate(self._counts):
            assert holders[block] == count, (
                f"block {block}: {holders[block]} holders, counted {count}"
            )
            assert free[block] == (count == 0), f"block {block}: {free[block]} times in free queue"
        assert len(free) + sum(1 for count in self._counts if count) == self.num_blocks
