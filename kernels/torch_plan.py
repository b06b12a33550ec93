"""What the PyTorch path works out once a step for every layer: which rows, keys and masks."""

from dataclasses import dataclass

import torch

from headlong.kernels.batch import AttentionBatch, GroupBatch
from headlong.kernels.layout import ArenaLayout, PageLayout
from headlong.kernels.reference import visible
from headlong.kernels.torch_compensation import DroppedPlan, plan_dropped
from headlong.kernels.torch_hidden import HiddenKeys
from headlong.kernels.torch_selection import ChoiceBucket, choosing_sequences, plan_choices
from headlong.kernels.torch_summaries import SummaryPlan, plan_summaries

PREFILL_TILE_ROWS = 128
"""Most query positions of one prefill tile: above this, causal skipping wastes too much."""

PREFILL_WORKSPACE = 1 << 25
"""Most logits of one prefill tile, over all query heads, where they have to be written out."""

PADDING_FACTOR = 1.25
"""Decodes share a bucket while the longest table is at most this much longer than the shortest."""


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """Decodes of similar length, padded to the longest.

    Attributes:
        rows: int64 [num_seqs], packed row of each query.
        blocks: int64 [num_seqs, 1, max_blocks]; padding repeats block 0.
        hidden: Which of their keys are not seen.
        dropped: What they have dropped; None if nothing, or nothing stands for it.
    """

    rows: torch.Tensor
    blocks: torch.Tensor
    hidden: HiddenKeys
    dropped: DroppedPlan | None


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """Consecutive rows of a chunk and the keys that any of them sees.

    The keys are entries [0, sink_end) and [window_start, window_end) of the gathered table.

    Attributes:
        start: First packed row.
        end: One past the last packed row.
        sink_end: End of the sink keys.
        window_start: First window key.
        window_end: One past the last key.
        masked_from: Keys before this one (of the two parts joined) are seen by every row.
        seen: bool [rows, keys - masked_from], what the law shows of the rest.
        dropped: What the rows have dropped; None if nothing, or nothing stands for it.
    """

    start: int
    end: int
    sink_end: int
    window_start: int
    window_end: int
    masked_from: int
    seen: torch.Tensor
    dropped: DroppedPlan | None


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One sequence's chunk in one group: its whole table, gathered once, and the tiles over it.

    Attributes:
        blocks: int64 [num_blocks].
        tiles: In order of rows; together they are the whole chunk.
    """

    blocks: torch.Tensor
    tiles: tuple[PrefillTile, ...]


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One head group's work.

    Attributes:
        blocks: int64 [total_tokens], block of each new token.
        offsets: int64 [total_tokens], its place in the block's pages.
        summaries: What changes of what pages say of their keys.
        decodes: Buckets of decodes that read all they see.
        choices: Buckets of those that choose pages.
        prefills: Chunks of more than one token.
    """

    blocks: torch.Tensor
    offsets: torch.Tensor
    summaries: SummaryPlan
    decodes: tuple[DecodeBucket, ...]
    choices: tuple[ChoiceBucket, ...]
    prefills: tuple[PrefillChunk, ...]


def build_plan(
    layout: ArenaLayout, batch: AttentionBatch, num_q_heads: int, device: torch.device
) -> tuple[GroupPlan, ...]:
    """Plan a step.

    Args:
        layout: The arena's map.
        batch: The ragged batch, on the CPU.
        num_q_heads: Bounds the workspace of a prefill tile.
        device: Where the plan's tensors go: all decisions are made on the CPU before.

    Returns:
        One plan a group.
    """
    bounds: list[int] = batch.cu_seqlens_q.tolist()
    context_lens: list[int] = batch.context_lens.tolist()
    decodes = [s for s in range(len(context_lens)) if bounds[s + 1] - bounds[s] == 1]
    prefills = [s for s in range(len(context_lens)) if bounds[s + 1] - bounds[s] > 1]
    plans: list[GroupPlan] = []
    for group, tables in enumerate(batch.groups):
        page = layout.pages[group]
        choosing = choosing_sequences(page, batch, tables)
        dense = sorted(set(decodes).difference(choosing))
        plans.append(
            GroupPlan(
                blocks=(tables.slot_mapping // page.block_size).to(device),
                offsets=(tables.slot_mapping % page.block_size).to(device),
                summaries=plan_summaries(page, tables, batch, device),
                decodes=tuple(
                    _decode_bucket(batch, tables, bucket, page, device)
                    for bucket in _buckets(dense, tables.table_lens)
                ),
                choices=plan_choices(page, batch, tables, choosing, device),
                prefills=tuple(
                    _prefill_chunk(
                        tables,
                        seq,
                        rows=(bounds[seq], bounds[seq + 1]),
                        context_len=context_lens[seq],
                        page=page,
                        num_q_heads=num_q_heads,
                        device=device,
                    )
                    for seq in prefills
                ),
            )
        )
    return tuple(plans)


def _buckets(seqs: list[int], table_lens: torch.Tensor) -> list[list[int]]:
    lens: list[int] = table_lens.tolist()
    buckets: list[list[int]] = []
    for seq in sorted(seqs, key=lambda s: lens[s]):
        # Short tables cost less padded than a bucket of their own would.
        if buckets and lens[seq] <= max(16, PADDING_FACTOR * lens[buckets[-1][0]]):
            buckets[-1].append(seq)
        else:
            buckets.append([seq])
    return buckets


def _decode_bucket(
    batch: AttentionBatch,
    tables: GroupBatch,
    seqs: list[int],
    page: PageLayout,
    device: torch.device,
) -> DecodeBucket:
    block_size = page.block_size
    index = torch.tensor(seqs)
    table_lens = tables.table_lens[index]
    longest = int(table_lens.max())
    query = batch.context_lens[index, None].long() - 1
    keys = torch.arange(longest * block_size)[None, :]
    positions = _positions(keys, tables, index[:, None], block_size)
    law = (positions <= query) & (
        (positions < tables.sink_sizes[index, None])
        | (positions > query - tables.window_sizes[index, None])
    )
    hidden = ~(law & (keys < table_lens[:, None] * block_size))
    return DecodeBucket(
        rows=batch.cu_seqlens_q[index].long().to(device),
        blocks=tables.block_tables[index, None, :longest].long().to(device),
        hidden=HiddenKeys.where(hidden, device),
        dropped=plan_dropped(page, tables, index, query, device),
    )


def _prefill_chunk(
    tables: GroupBatch,
    seq: int,
    *,
    rows: tuple[int, int],
    context_len: int,
    page: PageLayout,
    num_q_heads: int,
    device: torch.device,
) -> PrefillChunk:
    block_size = page.block_size
    num_blocks = int(tables.table_lens[seq])
    sink_size, window_size = int(tables.sink_sizes[seq]), int(tables.window_sizes[seq])
    # Keys between the sink blocks and the window blocks are gone: later ones move up.
    shift = int(tables.window_starts[seq] - tables.sink_blocks[seq]) * block_size
    sink_keys = int(tables.sink_blocks[seq]) * block_size
    first = context_len - (rows[1] - rows[0])
    tile_rows = max(16, min(PREFILL_TILE_ROWS, PREFILL_WORKSPACE // (num_q_heads * context_len)))
    tiles: list[PrefillTile] = []
    for start in range(first, context_len, tile_rows):
        end = min(start + tile_rows, context_len)
        window_start = max(0, start - window_size + 1)
        sink_end = min(sink_size, end)
        if window_start <= sink_end:
            window_start = sink_end = min(window_start, sink_end)
        keys = torch.cat([torch.arange(sink_end), torch.arange(window_start, end)])
        # Only the diagonal needs a mask where no key has left the window yet.
        masked_from = len(keys) - (end - start) if end - window_size < 1 else 0
        positions = torch.arange(start, end)
        law = visible(positions, keys[masked_from:], sink_size, window_size)
        tiles.append(
            PrefillTile(
                start=rows[0] + start - first,
                end=rows[0] + end - first,
                sink_end=sink_end,
                window_start=window_start - (shift if window_start >= sink_keys else 0),
                window_end=end - (shift if end > sink_keys else 0),
                masked_from=masked_from,
                seen=law.to(device),
                dropped=plan_dropped(page, tables, torch.tensor([seq]), positions[None], device),
            )
        )
    return PrefillChunk(tables.block_tables[seq, :num_blocks].long().to(device), tuple(tiles))


def _positions(
    keys: torch.Tensor, tables: GroupBatch, seqs: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Position of each key of gathered tables: `keys` index the table's tokens in order."""
    sink_keys = tables.sink_blocks[seqs] * block_size
    shift = (tables.window_starts[seqs] - tables.sink_blocks[seqs]) * block_size
    return torch.where(keys < sink_keys, keys, keys + shift)
