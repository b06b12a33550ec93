"""Where blocks are found beyond the arena."""

from dataclasses import dataclass

from headlong.cache.block_pool import BlockPool
from headlong.cache.block_tiers import BlockTiers
from headlong.cache.disk_tier import Name
from headlong.cache.prefix_match import ELSEWHERE


class HeldBlocks:
    """Where a group's blocks are found, files aside.

    Args:
        group: Index of the group.
        pool: Its blocks of the arena.
        tiers: What holds the others.
    """

    def __init__(self, group: int, pool: BlockPool, tiers: BlockTiers) -> None:
        self._group = group
        self._pool = pool
        self._tiers = tiers

    def find(self, key: bytes) -> int | None:
        """The block, or `ELSEWHERE`."""
        block = self._pool.find(key)
        if block is None and self._tiers.host.has(self._group, key):
            return ELSEWHERE
        return block

    def knew(self, key: bytes) -> bool:
        """Whether it is held anywhere, or was not long ago."""
        return self._pool.knew(key) or self._tiers.is_stored(self._group, key)


class StoredBlocks(HeldBlocks):
    """The same with files."""

    def find(self, key: bytes) -> int | None:
        """The block, or `ELSEWHERE`."""
        block = self._pool.find(key)
        if block is None and self._tiers.is_stored(self._group, key):
            return ELSEWHERE
        return block


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """What of a prefix would have to be read from disk.

    Attributes:
        num_tokens: Tokens of the prefix that would be found afterwards.
        names: Blocks to read.
        held: Blocks of the prefix that the host has already.
        num_bytes: Their bytes.
    """

    num_tokens: int
    names: tuple[Name, ...]
    held: tuple[Name, ...]
    num_bytes: int
