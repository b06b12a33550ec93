"""Bytes of a model's weights, as they are or quantised."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class WeightQuantisation:
    """How the matrices of linear layers are stored in fewer bits.

    Attributes:
        name: As torchao's configurations are called for short.
        element_bits: Bits of one element.
        group_size: Elements of a row that share a scale; None for the whole row.
        scale_bytes: Bytes of a group's scale, and zero point if there is one.
    """

    name: str
    element_bits: int
    group_size: int | None
    scale_bytes: int


WEIGHT_QUANTISATIONS: dict[str, WeightQuantisation] = {
    each.name: each
    for each in (
        WeightQuantisation("int8wo", element_bits=8, group_size=None, scale_bytes=2),
        WeightQuantisation("int4wo", element_bits=4, group_size=128, scale_bytes=4),
        WeightQuantisation("fp8", element_bits=8, group_size=None, scale_bytes=4),
    )
}
"""Weight-only, symmetric int8 by row, int4 by groups with zero points, and float8 by row."""


def weights_bytes(module: nn.Module, quantisation: WeightQuantisation | None = None) -> int:
    """Bytes of all parameters and buffers; tied ones count once.

    Args:
        module: The model, on any device.
        quantisation: Of its linear layers. The output layer and the embeddings stay as they are,
            and so do experts that are not linear layers.
    """
    small = {id(weight) for weight in _quantised(module)} if quantisation else set()
    total = 0
    for tensor in (*module.parameters(), *module.buffers()):
        if quantisation is not None and id(tensor) in small:
            total += _packed_bytes(tensor, quantisation)
        else:
            total += tensor.numel() * tensor.element_size()
    return total


def num_parameters(module: nn.Module) -> int:
    """Elements of all parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _quantised(module: nn.Module) -> Iterator[torch.Tensor]:
    output = module.get_output_embeddings()  # type: ignore[operator]
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer is not output:
            yield layer.weight


def _packed_bytes(weight: torch.Tensor, quantisation: WeightQuantisation) -> int:
    rows, columns = weight.shape
    groups = -(-columns // (quantisation.group_size or columns))
    packed = -(-columns * quantisation.element_bits // 8)
    return rows * (packed + groups * quantisation.scale_bytes)
