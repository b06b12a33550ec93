"""What the cache kernels compute, in plain PyTorch: the oracle of every kernel's test.

Nothing here is meant to be fast. One head, one sequence, one row of the law at a time.
`reference_summaries` states what pages say of their keys, `reference_selection` which pages a
retrieval head reads.
"""

import math

import torch

from headlong.kernels.batch import AttentionBatch
from headlong.kernels.codes import quantise
from headlong.kernels.layout import ArenaLayout, view_pages
from headlong.kernels.reference_pages import SequencePages
from headlong.kernels.reference_selection import Choices, chosen_pages
from headlong.kernels.reference_summaries import dropped_mean, summarise


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
    """Write the K and V of new tokens into their slots, then what their pages say of them.

    Args:
        arena: uint8 [total_bytes], changed in place.
        layout: The arena's map.
        layer: Which layer's heads.
        key: [total_tokens, num_kv_heads, head_dim], after RoPE.
        value: [total_tokens, num_kv_heads, head_dim].
        batch: Tables of the batch.
    """
    for heads in layout.layers[layer]:
        page_layout = layout.pages[heads.group]
        pages = view_pages(layout, arena, heads.group)
        slots = batch.groups[heads.group].slot_mapping.tolist()
        for page, head in enumerate(heads.kv_heads, start=heads.first_page):
            for row, slot in enumerate(slots):
                block, offset = divmod(slot, page_layout.block_size)
                both = ((pages.keys, key[row, head]), (pages.values, value[row, head]))
                for index, (section, new) in enumerate(both):
                    if page_layout.quantisation is None:
                        section[block, page, offset] = new
                        continue
                    codes = quantise(new, page_layout.quantisation)
                    section[block, page, offset] = codes.packed
                    assert pages.scales is not None
                    pages.scales[block, page, index, offset] = codes.scales
                    if pages.minima is not None and codes.minima is not None:
                        pages.minima[block, page, index, offset] = codes.minima
        if page_layout.summarised or page_layout.compensated:
            bounds = batch.cu_seqlens_q.tolist()
            for seq, context_len in enumerate(batch.context_lens.tolist()):
                num_new = bounds[seq + 1] - bounds[seq]
                for page in range(heads.first_page, heads.first_page + len(heads.kv_heads)):
                    held = SequencePages(arena, layout, batch, heads.group, page, seq)
                    summarise(held, context_len, num_new)


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
    choices: Choices | None = None,
) -> torch.Tensor:
    """Attention of the new tokens over the paged cache, which already holds their K and V.

    For query head h of KV head h // (num_q_heads / num_kv_heads), at position t:
        s_j = softcap * tanh(sm_scale * q.k_j / softcap)    (without softcap: sm_scale * q.k_j)
        o   = sum_j exp(s_j) v_j / (sum_j exp(s_j) + exp(sinks[h]))    over the j that t sees
    (without sinks the last term is absent). Where a layer compensates, one more j stands for the N
    tokens that t does not see any more: k_j and v_j are the means of theirs, and ln N is added to
    s_j (RazorAttention, arXiv 2407.15891).

    Args:
        query: [total_tokens, num_q_heads, head_dim], after RoPE.
        arena: uint8 [total_bytes].
        layout: The arena's map.
        layer: Which layer's heads.
        batch: Tables of the batch.
        sm_scale: Factor of the logits.
        softcap: Bound of the logits, as in Gemma 2.
        sinks: [num_q_heads], learned sink logits, as in gpt-oss.
        choices: What heads have chosen before; changed. None if nothing is remembered.

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
            q_heads = slice(kv_head * group_size, (kv_head + 1) * group_size)
            pages = SequencePages(arena, layout, batch, group, page, seq)
            mine = query[rows, q_heads].double()
            read = chosen_pages(pages, mine, batch, seq, (layer, kv_head), choices)
            key_positions = pages.positions(context_len, read)
            keys, values = pages.keys(key_positions), pages.values(key_positions)
            mask = visible(positions, key_positions, pages.sink_size, pages.window_size)
            for head in range(group_size):
                logits = mine[:, head] @ keys.T * sm_scale
                logits = _capped(logits, softcap).masked_fill(~mask, -math.inf)
                extra = [
                    _compensation(pages, layer, mine[row, head], int(t), sm_scale, softcap)
                    for row, t in enumerate(positions)
                ]
                columns = [logits, torch.stack([logit for logit, _ in extra])[:, None]]
                if sinks is not None:
                    sink = sinks[q_heads.start + head].double()
                    columns.append(sink.expand(len(positions), 1))
                weights = torch.softmax(torch.cat(columns, dim=1), dim=1)
                result = weights[:, : len(key_positions)] @ values
                means = torch.stack([mean for _, mean in extra])
                out[rows, q_heads.start + head] = (
                    result + weights[:, len(key_positions), None] * means
                )
    return out


def _compensation(
    pages: SequencePages,
    layer: int,
    query: torch.Tensor,
    position: int,
    sm_scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logit and value of what stands for the dropped tokens; -inf and 0 if there are none."""
    mean = dropped_mean(pages, position) if pages.layout.compensates(layer) else None
    if mean is None:
        return torch.tensor(-math.inf, dtype=torch.float64), torch.zeros_like(query)
    logit = _capped(query @ mean.key * sm_scale, softcap)
    return logit + math.log(mean.count), mean.value


def _capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
