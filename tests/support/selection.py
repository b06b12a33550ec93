"""Long contexts whose decodes choose pages, written straight into an arena."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, starmap
from pathlib import Path
from types import ModuleType

import torch

from headlong.cache.groups import build_head_groups
from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import HeadPolicy
from headlong.cache.sequence_cache import SequenceCache
from headlong.kernels import reference
from headlong.kernels.batch import UNBOUNDED, AttentionBatch, SelectionBatch, SelectionSettings
from headlong.kernels.codes import dequantise, quantise
from headlong.kernels.layout import (
    QUANTISATIONS,
    SPAN_BLOCKS,
    ArenaLayout,
    PageLayout,
    build_arena_layout,
    view_pages,
)
from headlong.kernels.reference_selection import Choices
from headlong.server.engine.batch import build_attention_batch
from support.compare import TOLERANCES, relative_error

Attend = Callable[["LongCase", int], torch.Tensor]
"""Attention of a layer over a case, [total_tokens, num_q_heads, head_dim]."""

RETRIEVAL = ((True, False, True), (True, True, True))
"""By layer and KV head; heads of a layer are not all neighbours in a block."""


@dataclass
class LongCase:
    """A step of decodes.

    Attributes:
        layout: The arena's map; group 0 has bounds.
        arena: uint8, K and V and bounds of all but the new tokens' successors; NaN elsewhere.
        cache: Its blocks.
        sequences: In the order of the batch.
        batch: The step.
        query: Of each layer, [num_q_heads, total_tokens, head_dim].
        rng: Draws the rest.
    """

    layout: ArenaLayout
    arena: torch.Tensor
    cache: KVCache
    sequences: list[SequenceCache]
    batch: AttentionBatch
    query: list[torch.Tensor]

    rng: torch.Generator

    @property
    def num_q_heads(self) -> int:
        return self.query[0].shape[0]

    @property
    def group_size(self) -> int:
        return self.num_q_heads // sum(len(heads.kv_heads) for heads in self.layout.layers[0])

    @property
    def head_dim(self) -> int:
        return self.query[0].shape[2]

    def only(self, seq: int) -> "LongCase":
        """The same step with one of the decodes."""
        chosen = self.batch.selection
        assert chosen is not None
        one = slice(seq, seq + 1)
        return replace(
            self,
            sequences=self.sequences[one],
            batch=replace(
                build_attention_batch(self.sequences[one], [1]),
                selection=SelectionBatch(
                    chosen.budgets[one], chosen.places[one], chosen.renews[one]
                ),
            ),
            query=[each[:, one] for each in self.query],
        )

    def draw_queries(self, like_before: float = 0.0) -> None:
        """Other queries, with a part of those before in them."""
        self.query = [
            (like_before * each + torch.randn(each.shape, generator=self.rng)).to(each.dtype)
            for each in self.query
        ]

    def grow(self) -> None:
        """One more token of every sequence, in the cache and in the batch."""
        for sequence in self.sequences:
            self.cache.extend(sequence, 1)
        chosen = self.batch.selection
        self.batch = replace(
            build_attention_batch(self.sequences, [1] * len(self.sequences)), selection=chosen
        )
        self.write()

    def write(self) -> None:
        """Random K, V and bounds for all that the sequences own."""
        for group, tables in enumerate(self.batch.groups):
            for seq, context in enumerate(self.batch.context_lens.tolist()):
                used = tables.block_tables[seq, : int(tables.table_lens[seq])].long()
                block_size = self.layout.pages[group].block_size
                gone = -(-context // block_size) - len(used)
                num_tokens = context - gone * block_size
                write_tokens(self.layout, self.arena, group, used, num_tokens, self.rng)


def settings_for(
    budget: int,
    num_places: int = 8,
    min_similarity: float | None = None,
    max_context: int = 1 << 14,
) -> SelectionSettings:
    return SelectionSettings(budget, num_places, max_context, min_similarity)


def selection(budgets: Sequence[int], renews: Sequence[bool] | None = None) -> SelectionBatch:
    """Sequence s has place num_seqs - s: none is its own index."""
    count = len(budgets)
    places = [count - seq if budget < UNBOUNDED else 0 for seq, budget in enumerate(budgets)]
    return SelectionBatch(
        budgets=torch.tensor(budgets, dtype=torch.int32),
        places=torch.tensor(places, dtype=torch.int32),
        renews=torch.tensor([True] * count if renews is None else renews),
    )


def build_long_case(
    contexts: Sequence[int],
    budgets: Sequence[int],
    *,
    block_size: int = 8,
    head_dim: int = 16,
    group_size: int = 2,
    dtype: torch.dtype = torch.float32,
    quantisation: str | None = None,
    num_new: Sequence[int] | None = None,
    retrieval: Sequence[Sequence[bool]] = RETRIEVAL,
    seed: int = 0,
) -> LongCase:
    """Sequences of so many tokens, the last of which are new and already appended: one of each."""
    num_new = num_new or [1] * len(contexts)
    rng = torch.Generator().manual_seed(seed)
    groups = build_head_groups(retrieval, HeadPolicy(4, 24), (None,) * len(retrieval))
    blocks = sum(-(-context // block_size) for context in contexts) + 2 * len(contexts)
    plain = PageLayout(block_size, head_dim, dtype)
    form = None if quantisation is None else QUANTISATIONS[quantisation]
    layout = build_arena_layout(
        members=tuple(group.members for group in groups),
        pages=(replace(plain, quantisation=form, summarised=True), plain),
        num_blocks=(blocks, blocks),
    )
    arena = torch.full((layout.total_bytes,), 255, dtype=torch.uint8)
    cache = KVCache(groups, layout)
    sequences = [cache.begin() for _ in contexts]
    # Grown in turns, so that the blocks of a sequence are no neighbours.
    for end in range(3 * block_size, max(contexts) + 3 * block_size, 3 * block_size):
        for sequence, context, new in zip(sequences, contexts, num_new, strict=True):
            if sequence.num_tokens < context - new:
                cache.extend(sequence, min(end, context - new) - sequence.num_tokens)
                cache.release_expired(sequence)
    for sequence, new in zip(sequences, num_new, strict=True):
        cache.extend(sequence, new)
    batch = build_attention_batch(sequences, num_new)
    shape = len(retrieval[0]) * group_size, sum(num_new), head_dim
    query = [torch.randn(shape, generator=rng).to(dtype) for _ in retrieval]
    batch = replace(batch, selection=selection(budgets))
    case = LongCase(layout, arena, cache, sequences, batch, query, rng)
    case.write()
    return case


def write_tokens(
    layout: ArenaLayout,
    arena: torch.Tensor,
    group: int,
    blocks: torch.Tensor,
    num_tokens: int,
    rng: torch.Generator,
) -> None:
    """Random K and V of so many tokens in blocks, and the bounds of their pages."""
    page, views = layout.pages[group], view_pages(layout, arena, group)
    shape = len(blocks), layout.group_pages[group], page.block_size
    written = torch.arange(len(blocks) * page.block_size).view(len(blocks), 1, -1) < num_tokens
    written = written.expand(shape)
    held = []
    for which, section in enumerate((views.keys, views.values)):
        drawn = torch.randn(*shape, page.head_dim, generator=rng).to(page.dtype)
        if page.quantisation is None:
            section[blocks] = drawn.masked_fill(~written[..., None], torch.nan)
            held.append(drawn)
            continue
        codes = quantise(drawn, page.quantisation)
        section[blocks] = codes.packed.masked_fill(~written[..., None], 255)
        assert views.scales is not None
        views.scales[blocks, :, which] = codes.scales.masked_fill(~written, torch.nan)
        if views.minima is not None and codes.minima is not None:
            views.minima[blocks, :, which] = codes.minima.masked_fill(~written, torch.nan)
        held.append(dequantise(codes, page.quantisation).to(page.dtype))
    if views.bounds is None:
        return
    hidden = ~written[..., None]
    least = held[0].masked_fill(hidden, torch.inf).amin(2)
    greatest = held[0].masked_fill(hidden, -torch.inf).amax(2)
    views.bounds[blocks, :, 0], views.bounds[blocks, :, 1] = least, greatest
    for first in range(0, len(blocks), SPAN_BLOCKS):
        span = slice(first, first + SPAN_BLOCKS)
        views.bounds[blocks[span], :, 2] = least[span].cummin(0).values
        views.bounds[blocks[span], :, 3] = greatest[span].cummax(0).values


def check_step(case: LongCase, attend: Attend, choices: Choices | None = None) -> None:
    """Every sequence in every layer is as the reference says."""
    bounds = case.batch.cu_seqlens_q.tolist()
    page = case.layout.pages[0]
    # Scales are applied to logits: one more rounding.
    tolerance = TOLERANCES[page.dtype] * (1 if page.quantisation is None else 2)
    for layer in range(len(case.layout.layers)):
        got, want = attend(case, layer), expected(case, layer, choices)
        for seq, rows in enumerate(starmap(slice, pairwise(bounds))):
            error = relative_error(got[rows], want[rows])
            assert error <= tolerance, (
                f"layer {layer}, sequence {seq}: off the reference by {error:.1e}"
            )


def check_steps(case: LongCase, attend: Attend) -> None:
    """Choices that are made, kept, made anew by some, and kept again."""
    choices = Choices()
    count = len(case.sequences)
    budgets = [96] * count
    for pattern in ([True], [False], [False, True], [False]):
        renews = [pattern[seq % len(pattern)] for seq in range(count)]
        case.batch = replace(case.batch, selection=selection(budgets, renews))
        check_step(case, attend, choices)
        case.draw_queries()


def expected(case: LongCase, layer: int, choices: Choices | None = None) -> torch.Tensor:
    return reference.attend(
        case.query[layer].transpose(0, 1),
        case.arena,
        case.layout,
        layer,
        case.batch,
        sm_scale=case.head_dim**-0.5,
        choices=choices,
    )


def plant_torch(folder: Path, name: str, module: str, right: str, wrong: str) -> str:
    """`support.triton.plant` for the PyTorch path."""
    directory = Path(reference.__file__).parent
    for path in directory.glob("torch_*.py"):
        source = path.read_text(encoding="utf-8")
        if path.stem == module:
            assert source.count(right) == 1, f"{right!r} must stand once in {path.name}"
            source = source.replace(right, wrong)
        source = source.replace("headlong.kernels.torch_", f"{name}.torch_")
        (folder / path.name).write_text(source, encoding="utf-8")
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    return name
