"""transformers' own eager attention under a per-head mask: the law, stated independently."""

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
    """

    def __init__(
        self,
        folder: Path,
        labels: Sequence[Sequence[bool]],
        sink_size: int,
        window_size: int,
    ) -> None:
        self.labels = labels
        self.sink_size = sink_size
        self.window_size = window_size
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
        rows = [
            self._visible(query.shape[2], keeps_all, sliding_window)
            for keeps_all in self.labels[module.layer_idx]
            for _ in range(module.num_key_value_groups)
        ]
        mask = torch.zeros(1, len(rows), *rows[0].shape)
        mask.masked_fill_(~torch.stack(rows), torch.finfo(torch.float32).min)
        return self._eager(module, query, key, value, mask, **options)

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
