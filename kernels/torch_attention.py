"""The PyTorch path: append and attend, batched and tiled for a CPU; it runs on any device.

It reads K and V through the block tables, a tile at a time, so that a long context streams through
the cache of the CPU once. In decode the query group is folded into the rows of a matrix product; in
prefill it is an axis that K and V are broadcast over, as views. Neither is ever copied to the query
heads.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from headlong.kernels.batch import AttentionBatch, SelectionSettings
from headlong.kernels.layout import ArenaLayout, LayerHeads
from headlong.kernels.torch_compensation import DroppedPlan, dropped_means
from headlong.kernels.torch_hidden import HiddenKeys
from headlong.kernels.torch_logits import Logits
from headlong.kernels.torch_pages import KEYS, VALUES, GroupPages
from headlong.kernels.torch_plan import GroupPlan, PrefillChunk, build_plan
from headlong.kernels.torch_selection import TorchSelection
from headlong.kernels.torch_summaries import update_summaries


class TorchAttention:
    """Append and attend over one arena. Tested against `kernels.reference`.

    Args:
        arena: uint8 [total_bytes]; its device is where everything is computed.
        layout: The arena's map.
        num_q_heads: Query heads of a layer.
        selection: How pages are chosen; None if no batch asks for it.

    Attributes:
        page_selection: Chooses pages and remembers choices, or None.

    Raises:
        ValueError: A budget is too small to choose any page.
    """

    def __init__(
        self,
        arena: torch.Tensor,
        layout: ArenaLayout,
        num_q_heads: int,
        selection: SelectionSettings | None = None,
    ) -> None:
        self.layout = layout
        self.num_q_heads = num_q_heads
        self._device = arena.device
        self._pages = [GroupPages(layout, arena, group) for group in range(layout.num_groups)]
        self.page_selection: TorchSelection | None = None
        if selection is not None:
            self.page_selection = TorchSelection(
                self._pages, layout, num_q_heads, selection, arena.device
            )
        self._head_index = [
            [torch.tensor(heads.kv_heads, device=arena.device) for heads in layer]
            for layer in layout.layers
        ]

    def plan(self, batch: AttentionBatch) -> tuple[GroupPlan, ...]:
        """Work out once a step what every layer needs; the batch is on the CPU."""
        return build_plan(self.layout, batch, self.num_q_heads, self._device)

    def append(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, plan: tuple[GroupPlan, ...]
    ) -> None:
        """See `AttentionBackend.append`."""
        for heads, index in zip(self.layout.layers[layer], self._head_index[layer], strict=True):
            pages, mine = self._pages[heads.group], plan[heads.group]
            if len(heads.kv_heads) < key.shape[0]:
                new_key, new_value = key[index], value[index]
            else:
                new_key, new_value = key, value
            pages.append(pages.numbers(heads, mine.blocks), mine.offsets, new_key, new_value)
            update_summaries(pages, heads, mine.summaries)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        plan: tuple[GroupPlan, ...],
        *,
        sm_scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        num_q_heads, num_tokens, head_dim = query.shape
        layer_heads = self.layout.layers[layer]
        num_kv_heads = sum(len(heads.kv_heads) for heads in layer_heads)
        grouped = query.view(num_kv_heads, num_q_heads // num_kv_heads, num_tokens, head_dim)
        out = query.new_empty(num_tokens, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
        for heads, index in zip(layer_heads, self._head_index[layer], strict=True):
            everyone = len(heads.kv_heads) == num_kv_heads
            mine = grouped if everyone else grouped[index]
            mine_sinks = None if sinks is None else sinks.view(num_kv_heads, -1, 1, 1)[index]
            logits = Logits(sm_scale, softcap, mine_sinks)
            result = out if everyone else out.new_empty(num_tokens, *mine.shape[:2], head_dim)
            compensates = self.layout.pages[heads.group].compensates(layer)
            for bucket in plan[heads.group].decodes:
                rows = mine[:, :, bucket.rows].permute(2, 0, 1, 3)
                dropped = bucket.dropped if compensates else None
                attended = self._decode(heads, rows, bucket.blocks, bucket.hidden, logits, dropped)
                result[bucket.rows] = attended.to(result.dtype)
            for choice in plan[heads.group].choices:
                assert self.page_selection is not None, "a batch chooses pages, its backend cannot"
                rows = mine[:, :, choice.rows].permute(2, 0, 1, 3)
                blocks = self.page_selection.choose(layer, heads, rows, choice)
                attended = self._decode(heads, rows, blocks, choice.hidden, logits)
                result[choice.rows] = attended.to(result.dtype)
            for chunk in plan[heads.group].prefills:
                self._prefill(heads, mine, chunk, logits, result, compensates=compensates)
            if not everyone:
                out[:, index] = result
        return out.view(num_tokens, num_q_heads, head_dim)

    def _decode(
        self,
        heads: LayerHeads,
        query: torch.Tensor,
        blocks: torch.Tensor,
        hidden: HiddenKeys,
        logits: Logits,
        dropped: DroppedPlan | None = None,
    ) -> torch.Tensor:
        """Attention of one new token of each sequence over the blocks listed for it.

        Args:
            heads: The heads.
            query: [num_seqs, heads, group_size, head_dim].
            blocks: int64 [num_seqs, heads or 1, num_blocks].
            hidden: Which of their keys not to see.
            logits: What to make of logits.
            dropped: For which tokens beside these one entry stands; None for none.

        Returns:
            float32 [num_seqs, heads, group_size, head_dim].
        """
        num_seqs, num_heads, group_size, head_dim = query.shape
        pages = self._pages[heads.group]
        numbers = pages.numbers(heads, blocks)
        num_rows, num_blocks = num_seqs * num_heads, blocks.shape[-1]
        block_size = pages.layout.block_size
        step = min(pages.tile_blocks(num_rows), num_blocks)
        scratch = pages.scratch(num_rows * step)

        # Scaled before the product: in float16 an unscaled logit can overflow.
        rows = (query.to(pages.dtype) * logits.sm_scale).reshape(num_rows, group_size, head_dim)
        scores = rows.new_empty(num_rows, group_size, num_blocks * block_size)
        for begin in range(0, num_blocks, step):
            keys = pages.tile(KEYS, numbers[..., begin : begin + step], scratch)
            span = slice(begin * block_size, (begin + step) * block_size)
            scores[..., span] = keys.dot(rows)
        shaped = scores.view(num_seqs, num_heads, group_size, 1, -1)
        if dropped is None:
            weights = logits.softmax(shaped, hidden.mask, pages.dtype)
            out = torch.zeros(num_rows, group_size, head_dim, device=self._device)
        else:
            means = dropped_means(pages, heads, dropped)
            extra = means.logits(query[:, :, :, None], logits)
            weights = logits.softmax(shaped, hidden.mask, pages.dtype, extra)
            out = means.mix(weights[..., -1:]).reshape(num_rows, group_size, head_dim)
        weights = weights.view(num_rows, group_size, -1)

        for begin in range(0, num_blocks, step):
            values = pages.tile(VALUES, numbers[..., begin : begin + step], scratch)
            first, last = begin * block_size, min(begin + step, num_blocks) * block_size
            # A weight of 0 times what an unwritten slot may hold is not 0.
            values.clear(num_seqs, *hidden.between(first, last))
            out += values.mix(weights[..., first:last])
        return out.view(num_seqs, num_heads, group_size, head_dim)

    def _prefill(
        self,
        heads: LayerHeads,
        query: torch.Tensor,
        chunk: PrefillChunk,
        logits: Logits,
        out: torch.Tensor,
        *,
        compensates: bool,
    ) -> None:
        """Attention of a chunk, written into `out` [total_tokens, heads, group_size, head_dim]."""
        num_heads, group_size, _, head_dim = query.shape
        pages = self._pages[heads.group]
        numbers = pages.numbers(heads, chunk.blocks)
        keys = pages.read(KEYS, numbers, query.dtype)
        values = pages.read(VALUES, numbers, query.dtype)
        for tile in chunk.tiles:
            seen = slice(tile.window_start, tile.window_end)
            tile_keys, tile_values = keys[:, seen], values[:, seen]
            if tile.sink_end:
                tile_keys = torch.cat([keys[:, : tile.sink_end], tile_keys], dim=1)
                tile_values = torch.cat([values[:, : tile.sink_end], tile_values], dim=1)
            rows = query[:, :, tile.start : tile.end]
            mask = tile.seen.new_ones(rows.shape[2], tile_keys.shape[1])
            mask[:, tile.masked_from :] = tile.seen
            dropped = tile.dropped if compensates else None
            if logits.plain and dropped is None:
                shape = (num_heads, group_size, -1, head_dim)
                result = scaled_dot_product_attention(
                    rows,
                    tile_keys[:, None].expand(shape),
                    tile_values[:, None].expand(shape),
                    attn_mask=mask,
                    scale=logits.sm_scale,
                )
            else:
                scores = torch.matmul(rows * logits.sm_scale, tile_keys[:, None].transpose(2, 3))
                if dropped is None:
                    weights = logits.softmax(scores, ~mask, query.dtype)
                    result = torch.matmul(weights, tile_values[:, None])
                else:
                    means = dropped_means(pages, heads, dropped)
                    extra = means.logits(rows[None], logits)[0]
                    weights = logits.softmax(scores, ~mask, query.dtype, extra)
                    result = torch.matmul(weights[..., :-1], tile_values[:, None])
                    result = result + means.mix(weights[None, ..., -1:])[0]
            out[tile.start : tile.end] = result.permute(2, 0, 1, 3)
