"""transformers' own eager attention under a per-head mask: the law, stated independently."""

import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM


class MaskedOracle:
    """A model whose every head sees what a label and a policy say.

    Args:
        folder: Checkpoint.
        labels: [num_layers][num_kv_heads], True keeps everything.
        sink_size: Of the other heads.
        window_size: Of the other heads.
        compensated_from: First layer in which one more key, with its value, stands for all that
            these do not see; None if none does.
    """

    def __init__(
        self,
        folder: Path,
        labels: Sequence[Sequence[bool]],
        sink_size: int,
        window_size: int,
        compensated_from: int | None = None,
    ) -> None:
        self.labels = labels
        self.sink_size = sink_size
        self.window_size = window_size
        self.compensated_from = compensated_from
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        modeling = import_module(type(self.model).__module__)
        self._eager = modeling.eager_attention_forward
        AttentionInterface.register("masked_oracle", self._attention)
        self.model.set_attn_implementation("masked_oracle")

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """float32 [len(token_ids), vocab_size]."""
        logits: torch.Tensor = self.model(torch.tensor([token_ids]), use_cache=False).logits[0]
        return logits

    def _attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        sliding_window: int | None = None,
        **options: Any,
    ) -> Any:
        labels = [
            keeps_all
            for keeps_all in self.labels[module.layer_idx]
            for _ in range(module.num_key_value_groups)
        ]
        length = query.shape[2]
        rows = [self._visible(length, keeps_all, sliding_window) for keeps_all in labels]
        mask = torch.zeros(1, len(rows), *rows[0].shape)
        mask.masked_fill_(~torch.stack(rows), torch.finfo(torch.float32).min)
        if self.compensated_from is not None and module.layer_idx >= self.compensated_from:
            # A key and a value for each query, which no other query sees.
            key, value = (torch.cat([each, self._means(each)], dim=2) for each in (key, value))
            counts = [
                self._counts(length, keeps_all or sliding_window is not None)
                for keeps_all in labels
            ]
            mask = torch.cat([mask, torch.stack(counts)[None]], dim=3)
        return self._eager(module, query, key, value, mask, **options)

    def _means(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean of what each query does not see, [1, num_kv_heads, length, head_dim]."""
        means = torch.zeros_like(tokens)
        for t in range(tokens.shape[2]):
            dropped = tokens[:, :, self.sink_size : max(0, t - self.window_size + 1)]
            if dropped.shape[2]:
                means[:, :, t] = dropped.mean(2)
        return means

    def _counts(self, length: int, never: bool) -> torch.Tensor:
        """Mask of the means: for each query's own the logarithm of the number of tokens."""
        mask = torch.full((length, length), torch.finfo(torch.float32).min)
        for t in range(length):
            dropped = t - self.window_size + 1 - self.sink_size
            if dropped > 0 and not never:
                mask[t, t] = math.log(dropped)
        return mask

    def _visible(self, length: int, keeps_all: bool, native: int | None) -> torch.Tensor:
        seen = torch.zeros(length, length, dtype=torch.bool)
        for t in range(length):
            if native is not None:
                seen[t, max(0, t - native + 1) : t + 1] = True
            elif keeps_all:
                seen[t, : t + 1] = True
            else:
                seen[t, max(0, t - self.window_size + 1) : t + 1] = True
                seen[t, : min(self.sink_size, t + 1)] = True
        return seen
