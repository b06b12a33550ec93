"""Which prefix of a sequence the cache still holds, and why not more of it.

A prefix of n blocks is held if every group that keeps all has its blocks 0 to n - 1, and every
group with a window has its sink blocks and the window's blocks at that point: less would leave a
query without keys that it may see.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from headlong.cache.policy import HeadPolicy
from headlong.cache.prefix_keys import PrefixKeys

MISS_REASONS = ("never_seen", "retrieval_evicted", "window_evicted", "partial_block", "salt")
"""Why tokens are not found; `PrefixMatch` says what each is."""


ELSEWHERE = -1
"""In a match, in place of a block that is held outside the arena."""


class Lookup(Protocol):
    """Where blocks of a group are looked up."""

    def find(self, key: bytes) -> int | None:
        """The block that has a key."""
        ...

    def knew(self, key: bytes) -> bool:
        """Whether a block has this key, or had it not long ago."""
        ...


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What a sequence can share.

    Attributes:
        num_tokens: Tokens found, whole blocks and fewer than were asked for: one at least is to be
            computed.
        blocks: For each group the blocks to share, as its table will hold them; `ELSEWHERE` for one
            that is not in the arena.
        misses: The other tokens, by reason; reasons that do not occur are left out.
            `never_seen`: nothing says that they were computed, under these policies.
            `retrieval_evicted`: they were, but a block that all queries need is gone.
            `window_evicted`: those are there, but not the sinks or the window at that point.
            `partial_block`: they do not fill a block that may be shared.
            `salt`: nothing was computed under this salt, but the first block was under another.
        keys: Key of each full block found.
    """

    num_tokens: int
    blocks: tuple[tuple[int, ...], ...]
    misses: Mapping[str, int] = field(default_factory=dict)
    keys: tuple[bytes, ...] = ()

    def places(
        self, policies: Sequence[HeadPolicy], block_size: int
    ) -> Iterator[tuple[int, int, int]]:
        """Group, logical index and block of everything in `blocks`, in that order.

        Args:
            policies: Those that it was found for.
            block_size: Tokens of a block.

        Raises:
            ValueError: It was found for other policies.
        """
        for group, (policy, blocks) in enumerate(zip(policies, self.blocks, strict=True)):
            reachable = policy.reachable_blocks(len(self.keys), block_size)
            if len(reachable) != len(blocks):
                raise ValueError("the match was found for other policies")
            for index, block in zip(reachable, blocks, strict=True):
                yield group, index, block


def match_prefix(
    keys: PrefixKeys,
    num_tokens: int,
    pools: Sequence[Lookup],
    block_size: int,
    *,
    salted_elsewhere: bool,
) -> PrefixMatch:
    """Find the longest prefix that can be shared, in time linear in the sequence's blocks.

    Args:
        keys: Of the sequence's full blocks.
        num_tokens: Length of the sequence.
        pools: Each group's blocks.
        block_size: Tokens of a block.
        salted_elsewhere: Whether the first block was computed under another salt.

    Returns:
        The match.

    Raises:
        ValueError: There are fewer keys than full blocks that could be found.
    """
    num_usable = max(0, num_tokens - 1) // block_size
    if num_usable > len(keys.blocks):
        raise ValueError(f"{num_tokens} tokens were asked for, but {len(keys.blocks)} blocks named")
    usable = keys.blocks[:num_usable]
    groups = tuple(zip(keys.policies, pools, strict=True))
    all_keeping = [pool for policy, pool in groups if policy.keeps_all]
    if all_keeping:
        num_kept = min(_leading(pool, usable) for pool in all_keeping)
        num_known = _known(all_keeping, usable, num_kept)
    else:
        num_kept = num_known = _known(pools, usable, 0)
    num_found = _shorten_to_windows(groups, usable, num_kept, block_size)
    misses = {
        "window_evicted": (num_kept - num_found) * block_size,
        "retrieval_evicted": (num_known - num_kept) * block_size,
        "salt" if salted_elsewhere and num_known == 0 else "never_seen": (num_usable - num_known)
        * block_size,
        "partial_block": num_tokens - num_usable * block_size,
    }
    return PrefixMatch(
        num_tokens=num_found * block_size,
        blocks=tuple(
            _shared(policy, pool, usable, num_found, block_size) for policy, pool in groups
        ),
        misses={reason: count for reason, count in misses.items() if count},
        keys=tuple(usable[:num_found]),
    )


def _leading(pool: Lookup, keys: Sequence[bytes]) -> int:
    """Number of first keys that are found."""
    return next((i for i, key in enumerate(keys) if pool.find(key) is None), len(keys))


def _known(pools: Sequence[Lookup], keys: Sequence[bytes], at_least: int) -> int:
    """Number of first blocks that were once computed: with any block, all before it were."""
    for pool in pools:
        longer = range(len(keys), at_least, -1)
        at_least = next((count for count in longer if pool.knew(keys[count - 1])), at_least)
    return at_least


def _shorten_to_windows(
    groups: Sequence[tuple[HeadPolicy, Lookup]],
    keys: Sequence[bytes],
    num_blocks: int,
    block_size: int,
) -> int:
    """Most blocks, up to `num_blocks`, at which no group lacks its sinks or its window."""
    windows = [
        _WindowSearch(policy, pool, keys, block_size)
        for policy, pool in groups
        if not policy.keeps_all
    ]
    while True:
        before = num_blocks
        for window in windows:
            num_blocks = window.shorten(num_blocks)
        if num_blocks == before:
            return num_blocks


class _WindowSearch:
    """Where one group has its sinks and its window; asked for shorter and shorter prefixes.

    It walks back from the end, so a hit takes no longer than its window.
    """

    def __init__(
        self, policy: HeadPolicy, pool: Lookup, keys: Sequence[bytes], block_size: int
    ) -> None:
        self._policy = policy
        self._pool = pool
        self._keys = keys
        self._block_size = block_size
        sinks = keys[: policy.sink_blocks(block_size)]
        num_sinks = _leading(pool, sinks)
        self._most = len(keys) if num_sinks == len(sinks) else num_sinks
        # From here to the end of the last prefix asked for all are there: none is looked up twice.
        self._run_start = len(keys)

    def shorten(self, num_blocks: int) -> int:
        """Most blocks, up to `num_blocks`, at which the group can go on."""
        num_blocks = min(num_blocks, self._most)
        while True:
            needed = self._policy.window_start(num_blocks * self._block_size, self._block_size)
            self._run_start = min(self._run_start, num_blocks)
            while self._run_start > needed and self._is_there(self._run_start - 1):
                self._run_start -= 1
            if self._run_start <= needed:
                return num_blocks
            # Every shorter prefix that reaches past the missing block needs it too.
            num_blocks = self._run_start - 1

    def _is_there(self, index: int) -> bool:
        return self._pool.find(self._keys[index]) is not None


def _shared(
    policy: HeadPolicy, pool: Lookup, keys: Sequence[bytes], num_blocks: int, block_size: int
) -> tuple[int, ...]:
    """The blocks of a prefix that a group's table holds."""
    blocks = [pool.find(keys[i]) for i in policy.reachable_blocks(num_blocks, block_size)]
    assert None not in blocks, "a match lists only blocks that are there"
    return tuple(block for block in blocks if block is not None)
