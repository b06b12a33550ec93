"""One sequence's block tables."""

from headlong.cache.block_table import BlockTable


class SequenceCache:
    """One block table a head group.

    Attributes:
        tables: In the order of the groups.
        num_tokens: Tokens that the tables have room for and that are, or are about to be, cached.
        num_published: First blocks that can be found by others, as far as they had keys.
        resume_keys: For each group, keys of the blocks that a continuation from the last full
            block needs of a window; the table may have given some of them back.
    """

    __slots__ = ("num_published", "num_tokens", "resume_keys", "tables")

    def __init__(self, tables: tuple[BlockTable, ...]) -> None:
        self.tables = tables
        self.num_tokens = 0
        self.num_published = 0
        self.resume_keys: tuple[list[bytes], ...] = tuple([] for _ in tables)
