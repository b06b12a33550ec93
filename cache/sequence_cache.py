"""One sequence's block tables."""

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
    """

    __slots__ = ("keys", "num_published", "num_tokens", "tables")

    def __init__(self, tables: tuple[BlockTable, ...]) -> None:
        self.tables = tables
        self.num_tokens = 0
        self.num_published = 0
        self.keys: Sequence[bytes] = ()

    @property
    def policies(self) -> tuple[HeadPolicy, ...]:
        """What it keeps of each group."""
        return tuple(table.policy for table in self.tables)
