"""From scheduled sequences to the tensors of one step."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from headlong.cache.block_table import BlockTable
from headlong.cache.sequence_cache import SequenceCache
from headlong.kernels.batch import AttentionBatch, GroupBatch, SelectionBatch


def build_attention_batch(
    caches: Sequence[SequenceCache],
    num_new: Sequence[int],
    selection: SelectionBatch | None = None,
) -> AttentionBatch:
    """Tables of a ragged batch.

    Args:
        caches: Each sequence's tables, already extended by its new tokens.
        num_new: New tokens of each sequence.
        selection: What of its pages each sequence reads; None if all read all.

    Returns:
        The batch, sequences in the given order, in the memory of the CPU.
    """
    cu_seqlens = np.concatenate([[0], np.cumsum(num_new)])
    context_lens = np.array([cache.num_tokens for cache in caches])
    positions = packed_positions(context_lens, np.asarray(num_new))
    owners = np.repeat(np.arange(len(caches)), num_new)
    return AttentionBatch(
        cu_seqlens_q=_tensor(cu_seqlens),
        context_lens=_tensor(context_lens),
        groups=tuple(
            _group_batch(tables, positions, owners)
            for tables in zip(*(cache.tables for cache in caches), strict=True)
        ),
        selection=selection,
    )


def packed_positions(
    context_lens: npt.NDArray[np.int64], num_new: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Position of every packed row: each sequence's last `num_new` of `context_lens` tokens."""
    starts = np.concatenate([[0], np.cumsum(num_new)[:-1]])
    offsets: npt.NDArray[np.int64] = np.repeat(context_lens - num_new - starts, num_new)
    return np.arange(len(offsets)) + offsets


def _group_batch(
    tables: Sequence[BlockTable],
    positions: npt.NDArray[np.int64],
    owners: npt.NDArray[np.int64],
) -> GroupBatch:
    lens = np.array([len(table.blocks) for table in tables])
    blocks = np.zeros((len(tables), int(lens.max())), dtype=np.int32)
    for row, table in zip(blocks, tables, strict=True):
        row[: len(table.blocks)] = np.frombuffer(table.blocks, dtype=np.int32)
    sink_blocks = np.array([table.num_sink_blocks for table in tables])
    window_starts = np.array([table.window_start for table in tables])
    block_size = tables[0].block_size
    logical = positions // block_size
    gone = np.where(logical < sink_blocks[owners], 0, (window_starts - sink_blocks)[owners])
    slots = blocks[owners, logical - gone].astype(np.int64) * block_size + positions % block_size
    return GroupBatch(
        block_tables=torch.from_numpy(blocks),
        table_lens=_tensor(lens),
        sink_blocks=_tensor(sink_blocks),
        window_starts=_tensor(window_starts),
        sink_sizes=_tensor([table.policy.sink_size for table in tables]),
        window_sizes=_tensor([table.policy.window_size for table in tables]),
        slot_mapping=torch.from_numpy(slots),
    )


def _tensor(values: npt.ArrayLike) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int32))
