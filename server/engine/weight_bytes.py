"""Bytes of a model's weights, as they lie in memory."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def stored_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold a weight: itself, or a quantised one's codes and scales."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from stored_tensors(getattr(tensor, name))


def weights_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, on any device; tied ones count once."""
    return sum(
        part.numel() * part.element_size()
        for tensor in (*module.parameters(), *module.buffers())
        for part in stored_tensors(tensor)
    )


def num_parameters(module: nn.Module) -> int:
    """Elements of all parameters, however they are stored; tied ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())
