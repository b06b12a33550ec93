"""The GPU path: append and attend by Triton kernels. Tested against `kernels.reference`."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from headlong.kernels.batch import AttentionBatch, SelectionSettings
from headlong.kernels.layout import ArenaLayout
from headlong.kernels.triton_append import append_kv
from headlong.kernels.triton_codes import page_formats
from headlong.kernels.triton_decode import decode_attention
from headlong.kernels.triton_merge import ROWS
from headlong.kernels.triton_plan import (
    SPLIT_KEYS,
    PackedStep,
    StepShape,
    TritonPlan,
    pack_step,
    view_step,
)
from headlong.kernels.triton_prefill import prefill_attention, prefill_variant
from headlong.kernels.triton_selection import TritonSelection
from headlong.kernels.triton_summaries import TritonSummaries
from headlong.kernels.triton_tables import build_group_table, build_layer_tables
from headlong.kernels.triton_variant import DTYPES, device_capability

PROGRAMS_PER_MULTIPROCESSOR = 4
"""Decode programs that share a multiprocessor, to hide each other's waits for memory."""

INTERPRETED_PROGRAMS = 3
"""Decode programs in the interpreter, where each costs time: enough to share work out."""


class TritonAttention:
    """Append and attend over one arena.

    Args:
        arena: uint8 [total_bytes], on a CUDA device, or on the CPU in Triton's interpreter.
        layout: The arena's map.
        num_q_heads: Query heads of a layer.
        selection: How pages are chosen; None if no batch asks for it.

    Attributes:
        page_selection: Chooses pages and remembers choices, or None.

    Raises:
        ValueError: The groups' pages differ in their elements' dtype or number, there is no kernel
            for their head size, block size or dtype, or a group has too many slots.
    """

    def __init__(
        self,
        arena: torch.Tensor,
        layout: ArenaLayout,
        num_q_heads: int,
        selection: SelectionSettings | None = None,
    ) -> None:
        page = layout.pages[0]
        if len({(each.block_size, each.head_dim, each.dtype) for each in layout.pages}) > 1:
            raise ValueError(f"pages of all groups must be alike, got {layout.pages}")
        if page.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES} for Triton, got {page.dtype}")
        if page.block_size & (page.block_size - 1):
            raise ValueError(f"block_size must be a power of two for Triton, got {page.block_size}")
        if max(layout.num_blocks) * page.block_size >= 2**31:
            raise ValueError(f"a group must have fewer than 2**31 slots, got {layout.num_blocks}")
        self.arena = arena
        self.layout = layout
        self.num_q_heads = num_q_heads
        self.page_selection = (
            None
            if selection is None or not any(each.summarised for each in layout.pages)
            else TritonSelection(arena, layout, num_q_heads, selection)
        )
        self._formats = page_formats(layout.pages)
        self._compensated = [
            page_formats([each for each in layout.pages if each.compensates(layer)])
            for layer in range(len(layout.layers))
        ]
        self._page = page
        self._layers = build_layer_tables(layout, arena.device)
        self._groups = build_group_table(layout, arena.device)
        self._summaries = TritonSummaries(arena, layout, self._groups)
        self._no_sinks = torch.full((num_q_heads,), -math.inf, device=arena.device)
        self._no_choices = torch.empty(0, 0, 0, dtype=torch.int32, device=arena.device)
        self._num_programs = _num_programs(arena.device)
        num_kv_heads = sum(len(heads.kv_heads) for heads in layout.layers[0])
        self._group_size = num_q_heads // num_kv_heads
        variant = prefill_variant(
            page.dtype,
            page.head_dim,
            softcap=False,
            formats=self._formats,
            capability=device_capability(arena.device),
        )
        tile_rows = variant.constants["ROWS"]
        assert isinstance(tile_rows, int)
        self._tile_rows = tile_rows
        row_tiles = -(-self._group_size // ROWS)
        self._items = np.zeros((len(layout.layers), layout.num_groups), dtype=np.int64)
        for layer, members in enumerate(layout.layers):
            for heads in members:
                self._items[layer, heads.group] = len(heads.kv_heads) * row_tiles

    def plan(self, batch: AttentionBatch) -> TritonPlan:
        """See `AttentionBackend.plan`."""
        packed = self.pack(batch)
        words = _staged(packed, self.arena.device).to(self.arena.device, non_blocking=True)
        return view_step(packed.shape, words, *self.workspace(packed.num_splits))

    def pack(self, batch: AttentionBatch, num_seqs: int | None = None) -> PackedStep:
        """Lay the step out on the CPU, padded to `num_seqs` decodes if that is given."""
        choosing = None if self.page_selection is None else self.page_selection.choosing
        return pack_step(batch, self._tile_rows, self._group_size, num_seqs, choosing)

    def largest_items(self, num_splits: Sequence[int]) -> int:
        """Most items of decode work of any layer, given the splits of each group."""
        return int((self._items @ np.asarray(num_splits, dtype=np.int64)).max())

    def workspace(self, num_splits: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Where results of splits go: float32 [items, rows, head_dim] and [items, rows]."""
        items, rows = self.largest_items(num_splits), min(ROWS, self._group_size)
        partial = torch.empty(items, rows, self._page.head_dim, device=self.arena.device)
        return partial, partial.new_empty(items, rows)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor, plan: TritonPlan) -> None:
        """See `AttentionBackend.append`."""
        tables = self._layers[layer]
        append_kv(
            self.arena,
            self._rows(key),
            self._rows(value),
            plan.slots,
            self._groups,
            tables.group_heads,
            tables.group_of,
            self._page.block_size,
            self._formats,
        )
        self._summaries.update(layer, tables.group_heads, plan)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        plan: TritonPlan,
        *,
        sm_scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        tables = self._layers[layer]
        query = self._rows(query)
        num_q_heads, num_tokens, head_dim = query.shape
        out = query.new_empty(num_tokens, num_q_heads, head_dim)
        logits = self._no_sinks if sinks is None else sinks.float().contiguous()
        shape = plan.shape
        if shape.num_decodes:
            chosen, chosen_group = self._no_choices, 0
            if self.page_selection is not None and shape.chooses:
                chosen_group = self.page_selection.choosing.group
                chosen = self.page_selection.choose(layer, query, tables.order, plan)
            decode_attention(
                out,
                plan.partial,
                plan.lse,
                query,
                logits,
                self.arena,
                self._groups,
                tables.group_heads,
                tables.order,
                tables.group_of,
                plan.rows,
                plan.tables,
                plan.splits,
                plan.lists,
                plan.choices,
                chosen,
                chosen_group,
                shape.num_decodes,
                self._num_programs,
                self._page.block_size,
                self._formats,
                self._compensated[layer],
                sm_scale,
                softcap or 0.0,
            )
        if shape.num_tiles:
            prefill_attention(
                out,
                query,
                logits,
                self.arena,
                self._groups,
                tables.group_heads,
                tables.order,
                tables.group_of,
                plan.rows,
                plan.tables,
                plan.lists,
                shape.num_tiles,
                self._page.block_size,
                self._formats,
                self._compensated[layer],
                sm_scale,
                softcap or 0.0,
            )
        return out

    def _rows(self, heads: torch.Tensor) -> torch.Tensor:
        """[heads, tokens, head_dim] as the kernels read it: rows in one piece, strides of 16."""
        if heads.dtype != self._page.dtype:
            raise ValueError(
                f"q, k and v must have the cache's dtype {self._page.dtype}, got {heads.dtype}"
            )
        aligned = heads.stride(0) % 16 == 0 and heads.stride(1) % 16 == 0
        return heads if heads.stride(2) == 1 and aligned else heads.contiguous()


class DecodeBuffer:
    """Plans of steps that only decode, at addresses that a CUDA graph can keep.

    All batch sizes share the memory: a step is over before the next is taken in.

    Args:
        attention: Whose plans.
        max_num_seqs: Most decodes of a step.
    """

    def __init__(self, attention: TritonAttention, max_num_seqs: int) -> None:
        self._attention = attention
        layout = attention.layout
        block_size = layout.pages[0].block_size
        # Of a sequence the last split may be a short one, and its sinks and window begin in tiles.
        splits = [
            blocks * block_size // SPLIT_KEYS + 2 * max_num_seqs for blocks in layout.num_blocks
        ]
        *_, (_, _, start) = self._shape(max_num_seqs).sections()
        num_words = start + sum(layout.num_blocks) + 2 * sum(splits)
        self._words = torch.zeros(num_words, dtype=torch.int32, device=attention.arena.device)
        self._workspace = attention.workspace(splits)

    def plan(self, num_seqs: int) -> TritonPlan:
        """The plan of a step of `num_seqs` decodes, padding included; `take` says which."""
        return view_step(self._shape(num_seqs), self._words, *self._workspace)

    def clear(self, num_seqs: int) -> None:
        """Make the plan of `num_seqs` decodes one of nothing but padding."""
        self._words.zero_()
        self.plan(num_seqs).slots.fill_(-1)

    def take(self, batch: AttentionBatch, num_seqs: int) -> bool:
        """Make the plan of `num_seqs` decodes that of a batch, which may have fewer.

        Returns:
            False, with everything left as it was, if the batch does not fit: sequences that share
            blocks can have more of them than the arena has.

        Raises:
            ValueError: The batch has prefill chunks, or more than `num_seqs` sequences.
        """
        packed = self._attention.pack(batch, num_seqs)
        partial, _ = self._workspace
        if len(packed.words) > len(self._words):
            return False
        if self._attention.largest_items(packed.num_splits) > len(partial):
            return False
        words = _staged(packed, self._words.device)
        self._words[: len(words)].copy_(words, non_blocking=True)
        return True

    def _shape(self, num_seqs: int) -> StepShape:
        return StepShape(
            num_groups=self._attention.layout.num_groups,
            num_seqs=num_seqs,
            num_decodes=num_seqs,
            num_tokens=num_seqs,
            num_tiles=0,
            chooses=self._attention.page_selection is not None,
        )


def _staged(packed: PackedStep, device: torch.device) -> torch.Tensor:
    """A step's words where a copy to the device need not wait for what the device has to do."""
    words = torch.from_numpy(packed.words)
    return words.pin_memory() if device.type == "cuda" else words


def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return PROGRAMS_PER_MULTIPROCESSOR * int(multiprocessors)
