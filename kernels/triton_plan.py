"""A step as the Triton kernels see it: one buffer of int32, worked out on the CPU, copied once.

`triton_pages` lists the fields. Decodes come first among the sequences, whatever their order in the
batch. The keys that a decode sees in a group are cut into splits of SPLIT_KEYS, counted from the
sequence's own first key, so that no result depends on batch mates.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from headlong.kernels.batch import AttentionBatch, GroupBatch
from headlong.kernels.triton_budget import ChoosingGroup, contexts_read, pack_choices

SPLIT_KEYS = 512
"""Most keys of one program of the decode kernel."""

KEY_ALIGNMENT = 64
"""A decode tile of keys never crosses a multiple of this, nor is it larger."""

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the sections' sizes follow from.

    Attributes:
        num_groups: Head groups.
        num_seqs: Sequences, decodes first.
        num_decodes: Sequences with one new token.
        num_tokens: New tokens.
        num_tiles: Tiles of rows of the prefill chunks.
        chooses: Whether any sequence may choose pages.
    """

    num_groups: int
    num_seqs: int
    num_decodes: int
    num_tokens: int
    num_tiles: int
    chooses: bool = False

    def sections(self) -> list[tuple[str, tuple[int, ...], int]]:
        """Name, shape and first word of each section but the last, `lists`."""
        shapes: list[tuple[str, tuple[int, ...]]] = [
            ("rows", (self.num_seqs, 4)),
            ("tables", (self.num_groups, self.num_seqs, 8)),
            ("splits", (self.num_groups, 2)),
            ("slots", (self.num_groups, self.num_tokens)),
            ("choices", (self.num_seqs, 4)),
        ]
        placed: list[tuple[str, tuple[int, ...], int]] = []
        start = 0
        for name, shape in shapes:
            placed.append((name, shape, start))
            # 16 bytes: what a wide load needs its section to begin at a multiple of.
            start += -(-int(np.prod(shape)) // 4) * 4
        return [*placed, ("lists", (0,), start)]


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A step on the CPU.

    Attributes:
        shape: Sizes of the sections.
        words: int32, all sections.
        num_splits: Splits of each group.
    """

    shape: StepShape
    words: Ints
    num_splits: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """A step on the device; the tensors are views of one buffer.

    Attributes:
        shape: Sizes of the sections.
        rows: int32 [num_seqs, 4].
        tables: int32 [num_groups, num_seqs, 8].
        splits: int32 [num_groups, 2].
        slots: int32 [num_groups, total_tokens].
        choices: int32 [num_seqs, 4].
        lists: int32 [...]; the tiles of prefill chunks come first.
        partial: float32 [items, rows, head_dim], results of splits.
        lse: float32 [items, rows], their log-sum-exp.
    """

    shape: StepShape
    rows: torch.Tensor
    tables: torch.Tensor
    splits: torch.Tensor
    slots: torch.Tensor
    choices: torch.Tensor
    lists: torch.Tensor
    partial: torch.Tensor
    lse: torch.Tensor


def key_span(context_lens: Ints, sink_sizes: Ints, window_sizes: Ints) -> Ints:
    """Keys that the last token of each sequence reads, counted in whole tiles but for the last.

    Sinks first, up to `sink_end`; then from `window_base`, where the tile of the window's first key
    begins, to the end. `decode_kernel` states the same.
    """
    contexts = context_lens.astype(np.int64)
    sink_end = _round_up(np.minimum(sink_sizes, contexts), KEY_ALIGNMENT)
    window_low = np.maximum(contexts - window_sizes, 0)
    window_base = np.maximum(window_low // KEY_ALIGNMENT * KEY_ALIGNMENT, sink_end)
    span: Ints = (sink_end + np.maximum(contexts - window_base, 0)).astype(np.int32)
    return span


def pack_step(
    batch: AttentionBatch,
    tile_rows: int,
    group_size: int,
    num_seqs: int | None = None,
    choosing: ChoosingGroup | None = None,
) -> PackedStep:
    """Lay a batch out.

    Args:
        batch: The batch, on the CPU.
        tile_rows: Rows of a tile of the prefill kernel; a row is a token and a query head.
        group_size: Query heads of a KV head.
        num_seqs: Pads a batch of decodes to so many sequences, without context or slots.
        choosing: The group whose pages are chosen; None if all are read.

    Returns:
        The step.

    Raises:
        ValueError: A batch with prefill chunks is to be padded, or is longer than `num_seqs`; a
            budget is larger than the choosing group's.
    """
    first_rows = _numpy(batch.cu_seqlens_q)
    num_new = np.diff(first_rows)
    order = np.argsort(num_new != 1, kind="stable")
    num_decodes = int((num_new == 1).sum())
    padding = 0 if num_seqs is None else num_seqs - len(order)
    if num_seqs is not None and (num_decodes < len(order) or padding < 0):
        raise ValueError(
            f"num_seqs {num_seqs} pads decodes only, got {num_decodes} of {len(order)} sequences"
        )
    contexts = _numpy(batch.context_lens)[order]
    tiles = _prefill_tiles(num_new[order], contexts, num_decodes, tile_rows, group_size)
    chosen = pack_choices(batch, order, choosing)
    shape = StepShape(
        num_groups=len(batch.groups),
        num_seqs=len(order) + padding,
        num_decodes=num_decodes + padding,
        num_tokens=int(first_rows[-1]) + padding,
        num_tiles=len(tiles),
        chooses=bool(chosen.any()),
    )

    rows = np.zeros((shape.num_seqs, 4), dtype=np.int32)
    rows[:, 0] = np.arange(shape.num_seqs)
    rows[:, 1] = 1
    rows[: len(order), 0] = first_rows[order]
    rows[: len(order), 1] = num_new[order]
    rows[: len(order), 2] = contexts
    tables = np.zeros((shape.num_groups, shape.num_seqs, 8), dtype=np.int32)
    splits = np.zeros((shape.num_groups, 2), dtype=np.int32)
    slots = np.full((shape.num_groups, shape.num_tokens), -1, dtype=np.int32)
    choices = np.zeros((shape.num_seqs, 4), dtype=np.int32)
    choices[: len(order)] = chosen
    lists: list[Ints] = [tiles.reshape(-1)]
    length = tiles.size
    for index, group in enumerate(batch.groups):
        read = contexts
        if choosing is not None and index == choosing.group:
            read = contexts_read(contexts, chosen, choosing.block_size)
        pairs = _place_sequences(tables[index, : len(order)], group, order, read[:num_decodes])
        splits[index] = len(pairs), length
        slots[index, : len(group.slot_mapping)] = _numpy(group.slot_mapping)
        block_tables, lens = _numpy(group.block_tables)[order], _numpy(group.table_lens)[order]
        starts = length + pairs.size + np.cumsum(lens) - lens
        tables[index, : len(order), 0] = starts
        used = block_tables[np.arange(block_tables.shape[1]) < lens[:, None]]
        lists += [pairs.reshape(-1), used]
        length += pairs.size + used.size
    sections = (rows, tables, splits, slots, choices, np.concatenate(lists))
    words = [np.zeros(0, dtype=np.int32)]
    for (_, _, start), section in zip(shape.sections(), sections, strict=True):
        words.append(np.zeros(start - sum(map(len, words)), dtype=np.int32))
        words.append(section.reshape(-1))
    return PackedStep(shape, np.concatenate(words), tuple(splits[:, 0].tolist()))


def view_step(
    step: StepShape, words: torch.Tensor, partial: torch.Tensor, lse: torch.Tensor
) -> TritonPlan:
    """The sections of a buffer that begins with the words of a packed step."""
    views: dict[str, torch.Tensor] = {}
    for name, shape, start in step.sections():
        size = int(np.prod(shape)) if name != "lists" else len(words) - start
        views[name] = words[start : start + size].view(*shape[:-1], -1) if size else words[:0]
    return TritonPlan(shape=step, partial=partial, lse=lse, **views)


def _place_sequences(
    fields: Ints, group: GroupBatch, order: npt.NDArray[np.int64], decode_contexts: Ints
) -> Ints:
    """Fill a group's fields [num_seqs, 8] but the first; its (sequence, split) pairs."""
    fields[:, 1] = _numpy(group.sink_blocks)[order]
    fields[:, 2] = (_numpy(group.window_starts) - _numpy(group.sink_blocks))[order]
    fields[:, 3] = _numpy(group.sink_sizes)[order]
    fields[:, 4] = _numpy(group.window_sizes)[order]
    num_decodes = len(decode_contexts)
    span = key_span(decode_contexts, fields[:num_decodes, 3], fields[:num_decodes, 4])
    counts = -(-span // SPLIT_KEYS)
    firsts = np.cumsum(counts) - counts
    fields[:num_decodes, 5] = firsts
    fields[:num_decodes, 6] = counts
    sequences = np.repeat(np.arange(num_decodes), counts)
    split = np.arange(len(sequences)) - np.repeat(firsts, counts)
    return np.stack([sequences, split], axis=1).astype(np.int32)


def _prefill_tiles(
    num_new: Ints, contexts: Ints, num_decodes: int, tile_rows: int, group_size: int
) -> Ints:
    """(sequence, tile) pairs of all chunks, those with the most keys to read first."""
    chunks = np.arange(num_decodes, len(num_new))
    counts = -(-num_new[chunks].astype(np.int64) * group_size // tile_rows)
    sequences = np.repeat(chunks, counts)
    tile = np.arange(len(sequences)) - np.repeat(np.cumsum(counts) - counts, counts)
    last_token = np.minimum(((tile + 1) * tile_rows - 1) // group_size + 1, num_new[sequences])
    reads = contexts[sequences] - num_new[sequences] + last_token
    pairs = np.stack([sequences, tile], axis=1).astype(np.int32)
    longest_first: Ints = pairs[np.argsort(-reads, kind="stable")]
    return longest_first


def _round_up(values: npt.NDArray[np.int64], multiple: int) -> npt.NDArray[np.int64]:
    rounded: npt.NDArray[np.int64] = -(-values // multiple) * multiple
    return rounded


def _numpy(tensor: torch.Tensor) -> Ints:
    array: Ints = tensor.numpy()
    return array
