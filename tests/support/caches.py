"""Caches of a few groups with one head each."""

from collections.abc import Mapping, Sequence

import torch

from headlong.cache.groups import HeadGroup
from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import HeadPolicy
from headlong.kernels.layout import PageLayout, build_arena_layout


def build_cache(
    policies: Mapping[str, HeadPolicy],
    num_blocks: Sequence[int],
    block_sizes: int | Sequence[int] = 4,
    *,
    prefix_caching: bool = True,
) -> KVCache:
    """Groups by their names, with so many blocks each."""
    sizes = [block_sizes] * len(policies) if isinstance(block_sizes, int) else block_sizes
    groups = [
        HeadGroup(name, policy, ((0, head),))
        for head, (name, policy) in enumerate(policies.items())
    ]
    layout = build_arena_layout(
        members=tuple(group.members for group in groups),
        pages=tuple(PageLayout(size, 2, torch.float32) for size in sizes),
        num_blocks=tuple(num_blocks),
    )
    return KVCache(groups, layout, prefix_caching=prefix_caching, namespace=b"model")
