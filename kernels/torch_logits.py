"""From logits to attention weights on the PyTorch path."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Logits:
    """Scale, cap, mask and normalise.

    Attributes:
        sm_scale: Factor of the logits.
        softcap: Their bound; None for none.
        sinks: [heads, group_size, 1, 1], learned sink logits; None for none.
    """

    sm_scale: float
    softcap: float | None
    sinks: torch.Tensor | None

    @property
    def plain(self) -> bool:
        """Whether PyTorch's own attention computes them."""
        return self.softcap is None and self.sinks is None

    def cap(self, scores: torch.Tensor) -> torch.Tensor:
        """Logits float32, bounded as the model does; overwrites float32 scores."""
        scores = scores.float()
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        return scores

    def softmax(
        self,
        scores: torch.Tensor,
        hidden: torch.Tensor,
        dtype: torch.dtype,
        extra: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention weights.

        Args:
            scores: [..., heads, group_size, num_rows, num_keys], sm_scale * q.k.
            hidden: bool, broadcast over the scores.
            dtype: Of the result; the sum is taken in float32.
            extra: float32 [..., heads, group_size, num_rows, 1], the logit of one more key.

        Returns:
            [..., num_keys], or [..., num_keys + 1] if there is one more.
        """
        columns = [self.cap(scores).masked_fill_(hidden, -math.inf)]
        if extra is not None:
            columns.append(extra)
        if self.sinks is not None:
            columns.append(self.sinks.float().expand(*scores.shape[:-1], 1))
        logits = columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)
        num_keys = scores.shape[-1] + (extra is not None)
        return torch.softmax(logits, dim=-1)[..., :num_keys].to(dtype)
