"""Layers of paged K and V with a ragged batch over them, as the engine would have left them."""

from collections.abc import Sequence
from dataclasses import dataclass

import gpu_checkout  # noqa: F401
import torch

from headlong.cache.groups import build_head_groups
from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import HeadPolicy
from headlong.cache.sequence_cache import SequenceCache
from headlong.kernels.batch import AttentionBatch
from headlong.kernels.layout import ArenaLayout, PageLayout, build_arena_layout
from headlong.server.engine.batch import build_attention_batch

Labels = tuple[tuple[bool, ...], ...]
"""[num_layers][num_kv_heads], True for a retrieval head."""

DUO_ATTENTION = HeadPolicy(sink_size=128, window_size=256)
"""What DuoAttention's streaming heads keep."""

HISTORY_CHUNK_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Heads of one layer."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads


GQA = HeadShape("gqa", num_q_heads=32, num_kv_heads=8, head_dim=128)
MHA = HeadShape("mha", num_q_heads=32, num_kv_heads=32, head_dim=128)


@dataclass(frozen=True, slots=True)
class Chunk:
    """`new` tokens of a sequence whose `cached` first tokens are in the cache."""

    cached: int
    new: int


@dataclass
class Paged:
    """An arena and a batch over it.

    Attributes:
        layout: The arena's map.
        arena: uint8 [total_bytes]; holds anything.
        cache: Owner of the blocks.
        sequences: Block tables of each chunk's sequence.
        chunks: New tokens of each sequence.
        batch: All of them, on the CPU.
    """

    layout: ArenaLayout
    arena: torch.Tensor
    cache: KVCache
    sequences: list[SequenceCache]
    chunks: tuple[Chunk, ...]
    batch: AttentionBatch

    def fill(self) -> None:
        """Random K and V everywhere."""
        for group in range(self.layout.num_groups):
            self.layout.view_group(self.arena, group).normal_()

    def fill_cached(self, generator: torch.Generator) -> None:
        """Random K and V of the cached tokens, and NaN wherever nothing was ever written.

        Args:
            generator: On the arena's device.
        """
        for group in range(self.layout.num_groups):
            pages = self.layout.view_group(self.arena, group)
            pages.fill_(torch.nan)
            block_size = pages.shape[3]
            for sequence, chunk in zip(self.sequences, self.chunks, strict=True):
                table = sequence.tables[group]
                for entry, block in enumerate(table.blocks):
                    gone = table.window_start - table.num_sink_blocks
                    logical = entry if entry < table.num_sink_blocks else entry + gone
                    count = min(block_size, chunk.cached - logical * block_size)
                    if count > 0:
                        pages[block, :, :, :count].normal_(generator=generator)

    def read_bytes(self, layer: int) -> int:
        """Bytes of K and V that decoding one token of each sequence must read in a layer."""
        total = 0
        for heads in self.layout.layers[layer]:
            tables, page = self.batch.groups[heads.group], self.layout.pages[heads.group]
            bounds = (tables.sink_sizes.long() + tables.window_sizes).minimum(
                self.batch.context_lens.long()
            )
            token_bytes = page.page_bytes // page.block_size
            total += int(bounds.sum()) * len(heads.kv_heads) * token_bytes
        return total

    def attention_flops(self, layer: int, group_size: int) -> int:
        """Operations of the products q.k and weights.v in a layer, hidden pairs not counted."""
        total = 0
        for heads in self.layout.layers[layer]:
            tables, page = self.batch.groups[heads.group], self.layout.pages[heads.group]
            bounds = (tables.sink_sizes.long() + tables.window_sizes).tolist()
            for chunk, bound in zip(self.chunks, bounds, strict=True):
                pairs = visible_pairs(chunk, bound)
                total += 4 * page.head_dim * pairs * len(heads.kv_heads) * group_size
        return total


def visible_pairs(chunk: Chunk, bound: int) -> int:
    """Pairs of a new token and a key that it sees, if it sees its last `bound` keys at most."""
    growing = max(0, min(chunk.new, bound - chunk.cached))
    return growing * chunk.cached + growing * (growing + 1) // 2 + (chunk.new - growing) * bound


def even_labels(num_layers: int, num_kv_heads: int, retrieval: float) -> Labels:
    """The same share of retrieval heads in every layer, spread over its heads."""
    count = round(num_kv_heads * retrieval)
    chosen = {index * num_kv_heads // count for index in range(count)}
    return (tuple(head in chosen for head in range(num_kv_heads)),) * num_layers


def build_paged(
    labels: Labels,
    streaming: HeadPolicy,
    page: PageLayout,
    chunks: Sequence[Chunk],
    device: torch.device,
    native_windows: Sequence[int | None] | None = None,
) -> Paged:
    """Lay out an arena that the chunks just fit, and extend their sequences.

    Args:
        labels: Which heads keep everything.
        streaming: What the others keep.
        page: Layout of a page.
        chunks: The batch.
        device: Where the arena goes.
        native_windows: [num_layers], a layer's own sliding window in tokens, or None.
    """
    groups = build_head_groups(labels, streaming, native_windows or (None,) * len(labels))
    layout = build_arena_layout(
        members=tuple(group.members for group in groups),
        pages=(page,) * len(groups),
        num_blocks=tuple(
            sum(_most_blocks(group.policy, chunk, page.block_size) for chunk in chunks)
            for group in groups
        ),
    )
    cache = KVCache(groups, layout)
    sequences = [cache.begin() for _ in chunks]
    for sequence, chunk in zip(sequences, chunks, strict=True):
        for _, count in _steps(chunk):
            cache.release_expired(sequence)
            cache.extend(sequence, count)
    return Paged(
        layout=layout,
        arena=torch.empty(layout.total_bytes, dtype=torch.uint8, device=device),
        cache=cache,
        sequences=sequences,
        chunks=tuple(chunks),
        batch=build_attention_batch(sequences, [chunk.new for chunk in chunks]),
    )


def _steps(chunk: Chunk) -> list[tuple[int, int]]:
    """(cached, new) tokens of each step of the sequence, the chunk being the last."""
    starts = range(0, chunk.cached, HISTORY_CHUNK_TOKENS)
    history = [(start, min(HISTORY_CHUNK_TOKENS, chunk.cached - start)) for start in starts]
    return [*history, (chunk.cached, chunk.new)]


def _most_blocks(policy: HeadPolicy, chunk: Chunk, block_size: int) -> int:
    return max(policy.live_blocks(cached, new, block_size) for cached, new in _steps(chunk))
