"""What the cache kernels compute, in plain PyTorch: the oracle of every kernel's test.

Nothing here is meant to be fast. One head, one sequence, one row of the law at a time.
"""

import math

import torch

from headlong.kernels.batch import AttentionBatch
from headlong.kernels.layout import ArenaLayout


def visible(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    sink_size: int,
    window_size: int,
) -> torch.Tensor:
    """The visibility law: j <= t and (j < sink_size or j > t - window_size).

    Args:
        query_positions: int [num_queries], t.
        key_positions: int [num_keys], j.
        sink_size: Tokens.
        window_size: Tokens; `UNBOUNDED` for a retrieval head.

    Returns:
        bool [num_queries, num_keys].
    """
    t = query_positions.long()[:, None]
    j = key_positions.long()[None, :]
    return (j <= t) & ((j < sink_size) | (j > t - window_size))


def append(
    arena: torch.Tensor,
    layout: ArenaLayout,
    layer: int,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: AttentionBatch,
) -> None:
    """Write the K and V of new tokens into their slots.

    Args:
        arena: uint8 [total_bytes], changed in place.
        layout: The arena's map.
        layer: Which layer's heads.
        key: [total_tokens, num_kv_heads, head_dim], after RoPE.
        value: [total_tokens, num_kv_heads, head_dim].
        batch: Slots of every group.
    """
    for heads in layout.layers[layer]:
        pages = layout.view_group(arena, heads.group)
        block_size = layout.pages[heads.group].block_size
        slots = batch.groups[heads.group].slot_mapping.tolist()
        for page, head in enumerate(heads.kv_heads, start=heads.first_page):
            for row, slot in enumerate(slots):
                block, offset = divmod(slot, block_size)
                pages[block, page, 0, offset] = key[row, head]
                pages[block, page, 1, offset] = value[row, head]


def attend(
    query: torch.Tensor,
    arena: torch.Tensor,
    layout: ArenaLayout,
    layer: int,
    batch: AttentionBatch,
    *,
    sm_scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the new tokens over the paged cache, which already holds their K and V.

    For query head h of KV head h // (num_q_heads / num_kv_heads), at position t:
        s_j = softcap * tanh(sm_scale * q.k_j / softcap)    (without softcap: sm_scale * q.k_j)
        o   = sum_j exp(s_j) v_j / (sum_j exp(s_j) + exp(sinks[h]))    over the j that t sees
    (without sinks the last term is absent).

    Args:
        query: [total_tokens, num_q_heads, head_dim], after RoPE.
        arena: uint8 [total_bytes].
        layout: The arena's map.
        layer: Which layer's heads.
        batch: Tables of the batch.
        sm_scale: Factor of the logits.
        softcap: Bound of the logits, as in Gemma 2.
        sinks: [num_q_heads], learned sink logits, as in gpt-oss.

    Returns:
        float64 [total_tokens, num_q_heads, head_dim].
    """
    out = torch.full(query.shape, torch.nan, dtype=torch.float64)
    num_kv_heads = sum(len(heads.kv_heads) for heads in layout.layers[layer])
    group_size = query.shape[1] // num_kv_heads
    bounds = batch.cu_seqlens_q.tolist()
    for seq, context_len in enumerate(batch.context_lens.tolist()):
        rows = slice(bounds[seq], bounds[seq + 1])
        positions = torch.arange(context_len - (bounds[seq + 1] - bounds[seq]), context_len)
        for kv_head in range(num_kv_heads):
            group, page = layout.head_page(layer, kv_head)
            tables = batch.groups[group]
            pages = layout.view_group(arena, group)[:, page].double()
            keys, key_positions = _gather(pages, batch, group, seq, context_len)
            mask = visible(
                positions,
                key_positions,
                int(tables.sink_sizes[seq]),
                int(tables.window_sizes[seq]),
            )
            for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                logits = query[rows, head].double() @ keys[0].T * sm_scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                logits = logits.masked_fill(~mask, -math.inf)
                if sinks is not None:
                    extra = sinks[head].double().expand(len(positions), 1)
                    logits = torch.cat([logits, extra], dim=1)
                weights = torch.softmax(logits, dim=1)[:, : len(key_positions)]
                out[rows, head] = weights @ keys[1]
    return out


def _gather(
    pages: torch.Tensor, batch: AttentionBatch, group: int, seq: int, context_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [2, num_keys, head_dim] that a sequence still owns, and their positions."""
    tables = batch.groups[group]
    block_size = pages.shape[2]
    sink_blocks, window_start = int(tables.sink_blocks[seq]), int(tables.window_starts[seq])
    found: list[torch.Tensor] = []
    positions: list[int] = []
    for entry in range(int(tables.table_lens[seq])):
        logical = entry if entry < sink_blocks else window_start + entry - sink_blocks
        first = logical * block_size
        count = min(block_size, context_len - first)
        block = int(tables.block_tables[seq, entry])
        found.append(pages[block, :, :count])
        positions.extend(range(first, first + count))
    return torch.cat(found, dim=1), torch.tensor(positions)
