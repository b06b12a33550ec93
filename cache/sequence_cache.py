"""One sequence's block tables."""

import heapq
from collections.abc import Sequence

from headlong.cache.block_table import BlockTable
from headlong.cache.policy import HeadPolicy


class SequenceCache:
    """One block table a head group.

    Attributes:
        tables: In the order of the groups.
        num_tokens: Tokens that the tables have room for and that are, or are about to be, cached.
        num_published: First blocks that can be found by others, in the tables or elsewhere, unless
            they were evicted.
        keys: Of these blocks, and perhaps of some that follow.
        place: A small number, 1 or more, that no other sequence has while this one lives.
    """

    __slots__ = ("keys", "num_published", "num_tokens", "place", "tables")

    def __init__(self, tables: tuple[BlockTable, ...], place: int = 1) -> None:
        self.tables = tables
        self.place = place
        self.num_tokens = 0
        self.num_published = 0
        self.keys: Sequence[bytes] = ()

    def missing_blocks(self, num_tokens: int) -> list[int]:
        """Blocks of each group to add for so many more tokens."""
        total = self.num_tokens + num_tokens
        return [table.missing_blocks(total) for table in self.tables]

    @property
    def policies(self) -> tuple[HeadPolicy, ...]:
        """What it keeps of each group."""
        return tuple(table.policy for table in self.tables)


class Places:
    """Numbers from 1 on, each one sequence's at a time; none is larger than they are many."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._num_known = 0

    def take(self) -> int:
        """The smallest that nobody has."""
        if self._free:
            return heapq.heappop(self._free)
        self._num_known += 1
        return self._num_known

    def give_back(self, place: int) -> None:
        """Let another sequence have it."""
        heapq.heappush(self._free, place)
