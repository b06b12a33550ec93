"""Layers of paged K and V with a ragged batch over them, as the engine would have left them."""

from collections.abc import Sequence
from dataclasses import dataclass

import gpu_checkout  # noqa: F401
import torch
from gpu_fill import fill_pages, fill_written

from headlong.cache.groups import RETRIEVAL_HEADS, STREAMING, build_head_groups
from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import HeadPolicy
from headlong.cache.sequence_cache import SequenceCache
from headlong.kernels.batch import AttentionBatch
from headlong.kernels.layout import (
    QUANTISATIONS,
    SPAN_BLOCKS,
    ArenaLayout,
    PageLayout,
    build_arena_layout,
)
from headlong.kernels.reference_selection import num_spans_looked_at
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


@dataclass(frozen=True, slots=True)
class Pages:
    """What the pages of a cache are, whatever its heads.

    Attributes:
        block_size: Tokens of a page.
        head_dim: Elements of K, and of V, of one token.
        dtype: Of K and V as layers make them.
        formats: Kinds of heads, and the format that theirs are stored in.
        summarised: Whether pages of retrieval heads know bounds.
        compensated: Whether pages of streaming heads know sums.
    """

    block_size: int
    head_dim: int
    dtype: torch.dtype
    formats: tuple[tuple[str, str], ...] = ()
    summarised: bool = False
    compensated: bool = False

    def page(self, kind: str) -> PageLayout:
        """Of one kind of heads."""
        form = dict(self.formats).get(kind)
        return PageLayout(
            self.block_size,
            self.head_dim,
            self.dtype,
            None if form is None else QUANTISATIONS[form],
            summarised=self.summarised and kind == RETRIEVAL_HEADS,
            compensated=self.compensated and kind == STREAMING,
        )


def all_heads(form: str | None) -> tuple[tuple[str, str], ...]:
    """The same format for every kind of head; None leaves K and V as they are."""
    return () if form is None else ((RETRIEVAL_HEADS, form), (STREAMING, form))


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
        fill_pages(self.layout, self.arena)

    def fill_cached(self, generator: torch.Generator) -> None:
        """Random K and V of the cached tokens, and NaN wherever nothing was ever written.

        Args:
            generator: On the arena's device.
        """
        for group in range(self.layout.num_groups):
            held = [
                (block, chunk.cached - logical * self.layout.pages[group].block_size)
                for sequence, chunk in zip(self.sequences, self.chunks, strict=True)
                for logical, block in _owned(sequence, group)
            ]
            fill_written(self.layout, self.arena, group, held, generator)

    def read_bytes(self, layer: int, budget: int | None = None) -> int:
        """Bytes that decoding one token of each sequence must read in a layer.

        Args:
            layer: Which.
            budget: Most tokens that a retrieval head reads; what choosing reads is counted apart.
        """
        total = 0
        for heads in self.layout.layers[layer]:
            tables, page = self.batch.groups[heads.group], self.layout.pages[heads.group]
            bounds = (tables.sink_sizes.long() + tables.window_sizes).minimum(
                self.batch.context_lens.long()
            )
            if budget is not None and page.summarised:
                bounds = bounds.clamp(max=budget)
            total += int(bounds.sum()) * len(heads.kv_heads) * page.entry_bytes
            if page.compensated:
                total += len(bounds) * len(heads.kv_heads) * 2 * 4 * page.head_dim
        return total

    def choice_bytes(self, layer: int, budget: int) -> int:
        """Bytes of bounds that a choice of pages reads in a layer, for one token of each sequence.

        Args:
            layer: Which.
            budget: Most tokens that a retrieval head reads.
        """
        total = 0
        for heads in self.layout.layers[layer]:
            page = self.layout.pages[heads.group]
            if not page.summarised:
                continue
            both = 2 * page.head_dim * page.dtype.itemsize
            looked_at = num_spans_looked_at(budget // page.block_size)
            for context in self.batch.context_lens.tolist():
                num_pages = -(-context // page.block_size)
                num_spans = -(-num_pages // SPAN_BLOCKS)
                if num_pages <= budget // page.block_size:
                    continue
                of_spans = num_spans if num_spans > looked_at else 0
                pages = min(num_pages, looked_at * SPAN_BLOCKS)
                total += (of_spans + pages) * both * len(heads.kv_heads)
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
    pages: Pages,
    chunks: Sequence[Chunk],
    device: torch.device,
    native_windows: Sequence[int | None] | None = None,
) -> Paged:
    """Lay out an arena that the chunks just fit, and extend their sequences.

    Args:
        labels: Which heads keep everything.
        streaming: What the others keep.
        pages: What its pages are.
        chunks: The batch.
        device: Where the arena goes.
        native_windows: [num_layers], a layer's own sliding window in tokens, or None.
    """
    groups = build_head_groups(labels, streaming, native_windows or (None,) * len(labels))
    layout = build_arena_layout(
        members=tuple(group.members for group in groups),
        pages=tuple(pages.page(group.kind) for group in groups),
        num_blocks=tuple(
            sum(_most_blocks(group.policy, chunk, pages.block_size) for chunk in chunks)
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


def _owned(sequence: SequenceCache, group: int) -> list[tuple[int, int]]:
    """Logical index and block of all that a sequence still owns in a group."""
    table = sequence.tables[group]
    found = [(logical, table.find(logical)) for logical in range(table.num_logical_blocks)]
    return [(logical, block) for logical, block in found if block is not None]


def _most_blocks(policy: HeadPolicy, chunk: Chunk, block_size: int) -> int:
    return max(policy.live_blocks(cached, new, block_size) for cached, new in _steps(chunk))
