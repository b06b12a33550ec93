"""What a sequence may still come to need of a group's blocks."""

from dataclasses import dataclass

from headlong.cache.block_pool import BlockPool
from headlong.cache.policy import HeadPolicy
from headlong.cache.prefix_match import PrefixMatch
from headlong.cache.sequence_cache import SequenceCache


@dataclass(frozen=True, slots=True)
class Reservation:
    """A sequence, and how far it will go.

    Attributes:
        policies: What it keeps of each group.
        num_tokens: Length that it will reach.
        cache: Its tables; None if it has not begun.
        match: What it will share, if it has not begun.
        forks: Sequences yet to be forked from it, which will reach the same length.
        fork_tokens: Its length when they are.
    """

    policies: tuple[HeadPolicy, ...]
    num_tokens: int
    cache: SequenceCache | None = None
    match: PrefixMatch | None = None
    forks: int = 0
    fork_tokens: int = 0

    def blocks_to_come(self, group: int, pool: BlockPool, block_size: int) -> int:
        """Blocks of a group that it, and its forks, may still take from the pool."""
        policy = self.policies[group]
        own = policy.steady_blocks(self.num_tokens, block_size)
        forked = self.forks * (own - self._shared_by_forks(policy, block_size))
        return max(0, own - self._held(group, pool, block_size)) + forked

    def _shared_by_forks(self, policy: HeadPolicy, block_size: int) -> int:
        """Full blocks that a fork never has to replace by its own."""
        full = self.fork_tokens // block_size
        return full if policy.keeps_all else min(full, policy.sink_blocks(block_size))

    def _held(self, group: int, pool: BlockPool, block_size: int) -> int:
        """Blocks that it need not take any more.

        Of a window only blocks of its own count: it gives a shared one back without making room.
        """
        policy = self.policies[group]
        num_sinks = policy.sink_blocks(block_size)
        if self.cache is not None:
            blocks = self.cache.tables[group].blocks
            if policy.keeps_all:
                return len(blocks)
            own = sum(not pool.is_shared(block) for block in blocks[num_sinks:])
            return min(len(blocks), num_sinks) + own
        if self.match is None:
            return 0
        shared = self.match.blocks[group]
        # A block that nobody owns leaves the pool's reserve as any other would.
        return sum(map(pool.is_owned, shared if policy.keeps_all else shared[:num_sinks]))
