"""Whether sequences fit the cache, however far they go."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from headlong.cache.groups import STREAMING, HeadGroup
from headlong.cache.policy import HeadPolicy
from headlong.cache.pools import Pools
from headlong.cache.reservation import Reservation, most_owned
from headlong.cache.sequence_cache import SequenceCache


class Room:
    """What sequences may come to need, against what there is.

    Args:
        groups: The model's head groups.
        block_sizes: Tokens of a block of each.
        pools: Their blocks.
        wide_tokens: Tokens that sequences which widen the streaming heads' policy hold in all,
            beside the others: where groups share the arena, these leave room for them.
    """

    def __init__(
        self,
        groups: Sequence[HeadGroup],
        block_sizes: Sequence[int],
        pools: Pools,
        wide_tokens: int = 0,
    ) -> None:
        self._block_sizes = block_sizes
        self._pools = pools
        self._own_policies = tuple(group.policy for group in groups)
        shared = pools.slabs is not None
        self._set_aside = [
            -(-wide_tokens // size) if shared and group.name == STREAMING else 0
            for group, size in zip(groups, block_sizes, strict=True)
        ]

    def fits(self, num_tokens: int, policies: tuple[HeadPolicy, ...]) -> bool:
        """Whether a sequence of this length could run if it had the cache to itself."""
        alone = [Reservation(policies, num_tokens)]
        return self._pools.hold(
            [
                policy.step_blocks(num_tokens, size) + self._kept_aside(group, size, alone)
                for group, (policy, size) in enumerate(
                    zip(policies, self._block_sizes, strict=True)
                )
            ]
        )

    def has_room(self, reservations: Sequence[Reservation], live: Iterable[SequenceCache]) -> bool:
        """Whether sequences can all be computed to their lengths, a token of each a step.

        Args:
            reservations: What grows, the new sequence first.
            live: All that hold blocks.
        """
        return self._pools.hold(
            [
                most_owned(group, pool, size, reservations, live)
                + self._kept_aside(group, size, reservations)
                for group, (pool, size) in enumerate(
                    zip(self._pools.groups, self._block_sizes, strict=True)
                )
            ]
        )

    def max_extension(self, sequence: SequenceCache, num_tokens: int) -> int:
        """How many of `num_tokens` more tokens fit into what a sequence has and what is free."""

        def lacks(count: int) -> bool:
            return not self._pools.have(sequence.missing_blocks(count))

        # The first number that does not fit, less one.
        return (
            bisect_left(range(1, num_tokens), True, key=lacks) if lacks(num_tokens) else num_tokens
        )

    def _kept_aside(self, group: int, block_size: int, reservations: Sequence[Reservation]) -> int:
        """What the new sequence must leave for wider ones, beside those that run already."""
        if not self._set_aside[group] or reservations[0].policies != self._own_policies:
            return 0
        taken = sum(
            (1 + each.forks) * each.policies[group].step_blocks(each.num_tokens, block_size)
            for each in reservations
            if each.policies != self._own_policies
        )
        return max(0, self._set_aside[group] - taken)
