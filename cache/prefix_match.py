"""Which prefix of a sequence the cache still holds, and why not more of it.

A prefix of n blocks is held if every group that keeps all has its blocks 0 to n - 1, and every
group with a window has its sink blocks and the window's blocks at that point: less would leave a
query without keys that it may see.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from headlong.cache.block_pool import BlockPool
from headlong.cache.policy import HeadPolicy
from headlong.cache.prefix_keys import PrefixKeys


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What a sequence can share.

    Attributes:
        num_tokens: Tokens found, whole blocks and fewer than were asked for: one at least is to be
            computed.
        blocks: For each group the blocks to share, as its table will hold them.
        misses: The other tokens, by reason: no such block was ever computed, a block that all
            queries need was evicted, a window's or sink's was, the salt differs, or they do not
            fill a block.
    """

    num_tokens: int
    blocks: tuple[tuple[int, ...], ...]
    misses: Mapping[str, int] = field(default_factory=dict)


def match_prefix(
    keys: PrefixKeys,
    num_tokens: int,
    pools: Sequence[BlockPool],
    block_size: int,
) -> PrefixMatch:
    """Find the longest prefix that can be shared.

    Args:
        keys: Of the sequence's full blocks.
        num_tokens: Length of the sequence.
        pools: Each group's blocks.
        block_size: Tokens of a block.

    Returns:
        The match; `salt` is not told apart from `never_seen` here.
    """
    usable = keys.blocks[: max(0, num_tokens - 1) // block_size]
    groups = tuple(zip(keys.policies, pools, strict=True))
    all_keeping = [pool for policy, pool in groups if policy.keeps_all]
    if all_keeping:
        num_kept = min(_leading(usable, pool.find) for pool in all_keeping)
    else:
        num_kept = _leading(usable, lambda key: next((1 for pool in pools if pool.knew(key)), None))
    windowed = [
        _complete_at(policy, pool, usable[:num_kept], block_size)
        for policy, pool in groups
        if not policy.keeps_all
    ]
    num_blocks = next(
        (n for n in range(num_kept, 0, -1) if all(complete[n] for complete in windowed)), 0
    )
    lost = num_kept < len(usable) and any(pool.knew(usable[num_kept]) for pool in all_keeping)
    misses: dict[str, int] = {
        "window_evicted": (num_kept - num_blocks) * block_size,
        "retrieval_evicted" if lost else "never_seen": (len(usable) - num_kept) * block_size,
        "partial_block": num_tokens - len(usable) * block_size,
    }
    return PrefixMatch(
        num_tokens=num_blocks * block_size,
        blocks=tuple(
            _shared(policy, pool, usable[:num_blocks], block_size) for policy, pool in groups
        ),
        misses={reason: count for reason, count in misses.items() if count},
    )


def _leading(keys: Sequence[bytes], find: Callable[[bytes], int | None]) -> int:
    """Number of first keys that are found."""
    return next((i for i, key in enumerate(keys) if find(key) is None), len(keys))


def _complete_at(
    policy: HeadPolicy, pool: BlockPool, keys: Sequence[bytes], block_size: int
) -> list[bool]:
    """For n in 0 to len(keys), whether a group with a window has all that a prefix of n needs."""
    present = [pool.find(key) is not None for key in keys]
    num_leading = next((i for i, here in enumerate(present) if not here), len(present))
    sinks = policy.sink_blocks(block_size)
    complete = [True]
    run = 0
    for n, here in enumerate(present, start=1):
        run = run + 1 if here else 0
        needed = n - policy.window_start(n * block_size, block_size)
        complete.append(min(sinks, n) <= num_leading and needed <= run)
    return complete


def _shared(
    policy: HeadPolicy, pool: BlockPool, keys: Sequence[bytes], block_size: int
) -> tuple[int, ...]:
    """The blocks of a prefix that a group's table holds."""
    if not policy.keeps_all:
        start = policy.window_start(len(keys) * block_size, block_size)
        keys = (*keys[: policy.sink_blocks(block_size)], *keys[start:])
    blocks = [pool.find(key) for key in keys]
    assert None not in blocks, "a match lists only blocks that are there"
    return tuple(block for block in blocks if block is not None)
