"""Keys that decodes gather with others and do not see, on the PyTorch path."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class HiddenKeys:
    """Keys of decodes that the law hides, and those of padding.

    Attributes:
        mask: bool [num_seqs, 1, 1, 1, num_keys].
        seqs: int64 [num_hidden], sequence of each.
        keys: int64 [num_hidden], its index among that sequence's keys.
    """

    mask: torch.Tensor
    seqs: torch.Tensor
    keys: torch.Tensor

    @classmethod
    def where(cls, hidden: torch.Tensor, device: torch.device) -> "HiddenKeys":
        """From bool [num_seqs, num_keys] on the CPU."""
        seqs, keys = hidden.nonzero(as_tuple=True)
        mask = hidden[:, None, None, None, :]
        return cls(mask.to(device), seqs.to(device), keys.to(device))

    def between(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Those from key `first` to `last - 1`: their sequences, and their indices from `first`."""
        mine = (self.keys >= first) & (self.keys < last)
        return self.seqs[mine], self.keys[mine] - first
