"""Caches of a few groups with one head each."""

from collections.abc import Callable, Mapping, Sequence

import torch

from headlong.cache.arena import Arena
from headlong.cache.block_copy import BlockCopy
from headlong.cache.groups import HeadGroup
from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import HeadPolicy
from headlong.cache.tiered_cache import TieredCache
from headlong.kernels.layout import PageLayout, build_arena_layout, build_slab_layout


def build_cache(
    policies: Mapping[str, HeadPolicy],
    num_blocks: Sequence[int],
    block_sizes: int | Sequence[int] = 4,
    *,
    prefix_caching: bool = True,
    copy_blocks: Callable[[Sequence[BlockCopy]], None] = lambda copies: None,
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
    return KVCache(
        groups,
        layout,
        prefix_caching=prefix_caching,
        namespace=b"model",
        copy_blocks=copy_blocks,
    )


def build_slab_cache(
    policies: Mapping[str, HeadPolicy],
    members: Sequence[int],
    slab_pages: int,
    num_slabs: int,
    block_size: int = 4,
    *,
    prefix_caching: bool = True,
    copy_blocks: Callable[[Sequence[BlockCopy]], None] = lambda copies: None,
) -> KVCache:
    """Groups by their names that share slabs, with so many heads each, each in a layer of its own.

    Args:
        policies: What the groups keep, by name.
        members: Their heads, so pages of their blocks.
        slab_pages: Pages of a slab.
        num_slabs: Slabs.
        block_size: Tokens of a block.
        prefix_caching: As that of `KVCache`.
        copy_blocks: As that of `KVCache`.
    """
    page = PageLayout(block_size, 2, torch.float32)
    groups = [
        HeadGroup(name, policy, tuple((layer, head) for head in range(count)))
        for layer, ((name, policy), count) in enumerate(zip(policies.items(), members, strict=True))
    ]
    layout = build_slab_layout(
        members=tuple(group.members for group in groups),
        pages=(page,) * len(groups),
        slab_bytes=slab_pages * page.page_bytes,
        num_slabs=num_slabs,
    )
    return KVCache(
        groups,
        layout,
        prefix_caching=prefix_caching,
        namespace=b"model",
        copy_blocks=copy_blocks,
    )


def build_tiered_cache(
    policies: Mapping[str, HeadPolicy],
    num_blocks: Sequence[int],
    block_size: int = 4,
    *,
    slab_pages: int = 0,
) -> tuple[TieredCache, torch.Tensor]:
    """The same with an arena, whose tiers are still to be attached.

    Args:
        policies: What the groups keep, by name.
        num_blocks: Blocks of each group.
        block_size: Tokens of a block.
        slab_pages: Pages of a slab, if the groups are to share as much memory in slabs.
    """
    plain = build_cache(policies, num_blocks, block_size)
    layout = plain.layout
    if slab_pages:
        layout = build_slab_layout(
            members=tuple(group.members for group in plain.groups),
            pages=layout.pages,
            slab_bytes=slab_pages * layout.pages[0].page_bytes,
            num_slabs=max(len(plain.groups), sum(num_blocks) // slab_pages),
        )
    arena = Arena(layout, torch.device("cpu"))
    cache = TieredCache(plain.groups, layout, namespace=b"model", copy_blocks=arena.copy_blocks)
    return cache, arena.memory
