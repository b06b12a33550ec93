"""What sequences may still come to need of a group's blocks.

Of the blocks that a sequence holds, some are *fixed*: all of a group that keeps all, and the sink
blocks. It holds them for as long as it lives, and a shared one is there once. The others *move*:
sooner or later its window has replaced each by a block of its own, so that what it shares of them
now saves nothing in the end, and every sequence counts with the most blocks of its window.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from headlong.cache.block_pool import BlockPool
from headlong.cache.policy import HeadPolicy
from headlong.cache.prefix_match import ELSEWHERE, PrefixMatch
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

    def growth(self, group: int, pool: BlockPool, block_size: int) -> tuple[int, int]:
        """What it and its forks add to a group, if they are computed a token a step.

        Args:
            group: The group's index.
            pool: Its blocks.
            block_size: Its tokens of a block.

        Returns:
            Fixed blocks that are yet to be owned, and most blocks of all their windows together.
        """
        policy = self.policies[group]
        fixed = _num_fixed(policy, -(-self.num_tokens // block_size), block_size)
        window = policy.step_blocks(self.num_tokens, block_size) - fixed
        has_fixed = has_window = 0
        added = 0
        if self.cache is not None:
            table = self.cache.tables[group]
            has_window = len(table.window_blocks)
            has_fixed = len(table.blocks) - has_window
        elif self.match is not None:
            shared = self.match.blocks[group]
            has_fixed = _num_fixed(policy, len(shared), block_size)
            has_window = len(shared) - has_fixed
            # A block that nobody owns is taken from what others could have.
            added = sum(
                block == ELSEWHERE or not pool.is_owned(block) for block in shared[:has_fixed]
            )
        added += max(0, fixed - has_fixed)
        forked = _num_fixed(policy, self.fork_tokens // block_size, block_size)
        added += self.forks * max(0, fixed - forked)
        return added, max(window, has_window) + self.forks * window


def most_owned(
    group: int,
    pool: BlockPool,
    block_size: int,
    reservations: Iterable[Reservation],
    live: Iterable[SequenceCache],
) -> int:
    """Most blocks of a group that will ever be owned at once.

    fixed blocks now + fixed blocks yet to be owned + blocks of all windows

    Args:
        group: The group's index.
        pool: Its blocks.
        block_size: Its tokens of a block.
        reservations: What grows.
        live: All that hold blocks; without a reservation a sequence keeps what it has.
    """
    growing: set[SequenceCache] = set()
    fixed = windows = 0
    for reservation in reservations:
        more_fixed, window = reservation.growth(group, pool, block_size)
        fixed += more_fixed
        windows += window
        if reservation.cache is not None:
            growing.add(reservation.cache)
    moving: set[int] = set()
    staying: set[int] = set()
    for sequence in live:
        blocks = sequence.tables[group].window_blocks
        moving.update(blocks)
        if sequence not in growing:
            staying.update(blocks)
    return pool.num_owned - len(moving) + fixed + windows + len(staying)


def _num_fixed(policy: HeadPolicy, num_blocks: int, block_size: int) -> int:
    """How many of the first `num_blocks` blocks are never given back."""
    return num_blocks if policy.keeps_all else min(num_blocks, policy.sink_blocks(block_size))
