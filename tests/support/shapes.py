"""Small caches to size: groups of a few heads of 8 elements."""

import torch

from headlong.cache.cache_shape import CacheShape
from headlong.cache.groups import HeadGroup
from headlong.cache.policy import HeadPolicy

STREAMING = HeadPolicy(sink_size=4, window_size=12)
BLOCK_SIZE = 4
# K and V of a head for a block, in float32.
PAGE_BYTES = 2 * BLOCK_SIZE * 8 * 4


def build_shape(
    policies: dict[HeadPolicy, int],
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 32,
    wide_tokens: int = 0,
) -> CacheShape:
    """A shape with a group of so many heads for each policy; the first window is the profile's."""
    names = (name for name in ("streaming", *(f"sliding-{layer}" for layer in range(9))))
    groups = tuple(
        HeadGroup(
            "retrieval" if policy.keeps_all else next(names),
            policy,
            tuple((layer, head) for head in range(count)),
        )
        for layer, (policy, count) in enumerate(policies.items())
    )
    return CacheShape(
        groups,
        8,
        torch.float32,
        BLOCK_SIZE,
        max_num_seqs,
        max_num_batched_tokens,
        wide_tokens=wide_tokens,
    )
