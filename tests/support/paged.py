"""A small paged cache with a ragged batch in it, as the engine would have left it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from headlong.cache.cache_shape import CacheShape
from headlong.cache.groups import HeadGroup, build_head_groups
from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import HeadPolicy
from headlong.cache.sequence_cache import SequenceCache
from headlong.kernels import reference
from headlong.kernels.batch import AttentionBatch
from headlong.kernels.layout import QUANTISATIONS, ArenaLayout, build_arena_layout
from headlong.server.engine.batch import build_attention_batch


@dataclass(frozen=True)
class Geometry:
    retrieval: tuple[tuple[bool, ...], ...]
    streaming: HeadPolicy
    group_size: int
    head_dim: int
    block_size: int
    native_windows: tuple[int | None, ...]
    dtype: torch.dtype = torch.float32
    # of kinds of heads, by name; kinds left out are not quantised
    formats: Mapping[str, str] = field(default_factory=dict)
    summarised: bool = False
    compensated: bool = False

    @property
    def num_kv_heads(self) -> int:
        return len(self.retrieval[0])

    @property
    def num_q_heads(self) -> int:
        return self.num_kv_heads * self.group_size

    @property
    def groups(self) -> tuple[HeadGroup, ...]:
        return build_head_groups(self.retrieval, self.streaming, self.native_windows)

    @property
    def shape(self) -> CacheShape:
        return CacheShape(
            self.groups,
            self.head_dim,
            self.dtype,
            self.block_size,
            max_num_seqs=1,
            max_num_batched_tokens=1,
            formats={kind: QUANTISATIONS[name] for kind, name in self.formats.items()},
            summarised=self.summarised,
            compensated=self.compensated,
        )


@dataclass
class PagedCase:
    geometry: Geometry
    layout: ArenaLayout
    arena: torch.Tensor
    cache: KVCache
    sequences: list[SequenceCache]
    batch: AttentionBatch
    # per layer: [total_tokens, heads, head_dim] of the new tokens
    query: list[torch.Tensor]
    key: list[torch.Tensor]
    value: list[torch.Tensor]


def build_layout(geometry: Geometry, num_blocks: int) -> ArenaLayout:
    groups = geometry.groups
    return build_arena_layout(
        members=tuple(group.members for group in groups),
        pages=tuple(geometry.shape.page(group) for group in groups),
        num_blocks=(num_blocks,) * len(groups),
    )


def build_case(
    geometry: Geometry, lengths: Sequence[tuple[int, int]], seed: int, history_chunk: int = 7
) -> PagedCase:
    """Sequences of (cached, new) tokens; what is cached was written in chunks, windows moving.

    Every float of the arena begins as NaN, so whatever is read without having been written shows.
    """
    rng = torch.Generator().manual_seed(seed)
    longest = sum(-(-(old + new) // geometry.block_size) for old, new in lengths) + len(lengths)
    layout = build_layout(geometry, longest)
    arena = torch.full((layout.total_bytes,), 0xFF, dtype=torch.uint8)
    cache = KVCache(geometry.groups, layout)
    sequences = [cache.begin() for _ in lengths]
    num_layers = len(geometry.retrieval)

    def draw(tokens: int, heads: int) -> torch.Tensor:
        drawn = torch.randn(tokens, heads, geometry.head_dim, generator=rng)
        return drawn.to(geometry.dtype)

    for sequence, (old, _) in zip(sequences, lengths, strict=True):
        while sequence.num_tokens < old:
            chunk = min(history_chunk, old - sequence.num_tokens)
            cache.extend(sequence, chunk)
            batch = build_attention_batch([sequence], [chunk])
            for layer in range(num_layers):
                key, value = draw(chunk, geometry.num_kv_heads), draw(chunk, geometry.num_kv_heads)
                reference.append(arena, layout, layer, key, value, batch)
            cache.release_expired(sequence)
    for sequence, (_, new) in zip(sequences, lengths, strict=True):
        cache.extend(sequence, new)
    num_new = [new for _, new in lengths]
    total = sum(num_new)
    return PagedCase(
        geometry=geometry,
        layout=layout,
        arena=arena,
        cache=cache,
        sequences=sequences,
        batch=build_attention_batch(sequences, num_new),
        query=[draw(total, geometry.num_q_heads) for _ in range(num_layers)],
        key=[draw(total, geometry.num_kv_heads) for _ in range(num_layers)],
        value=[draw(total, geometry.num_kv_heads) for _ in range(num_layers)],
    )
