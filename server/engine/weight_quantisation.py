"""Weights of linear layers in 8 or 4 bits, through torchao.

The linear layers of a model are stored in fewer bits; its embeddings and its output layer stay as
they are, tied ones stay tied. torchao is imported when such weights are asked for, not before.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headlong.server.errors import ConfigError

INT4_GROUP_SIZES = (128, 64, 32)
"""Elements of a row that share a scale and a zero point; torchao's own choice comes first."""

FLOAT8_PRODUCTS = (8, 9)
"""Compute capability from which on GPUs multiply float8 by float8."""

Layers = Sequence[tuple[str, nn.Linear]]


@dataclass(frozen=True, slots=True)
class Processor:
    """What computes a model, and so in which formats its weights can lie.

    Attributes:
        kind: "cpu" or "cuda".
        capability: Compute capability of a CUDA device; without meaning elsewhere.
    """

    kind: str
    capability: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, device: torch.device) -> "Processor":
        """The processor of a device."""
        if device.type != "cuda":
            return cls(device.type)
        return cls(device.type, torch.cuda.get_device_capability(device))


def quantise_weights(module: nn.Module, quantization: str, device: torch.device) -> None:
    """Store the weights of linear layers in fewer bits, one layer after the other.

    Args:
        module: The transformers model, in the host's memory or on `device`.
        quantization: "int8wo", "int4wo" or "fp8".
        device: Where each linear layer goes before its weights are made smaller, so that a device
            never holds more than one of them in full.

    Raises:
        ConfigError: torchao is missing, or a layer or the device does not suit it.
    """
    layers = _linear_layers(module, quantization)
    weight_format = _choose(quantization, layers, Processor.of(device))
    for _, layer in layers:
        layer.to(device)
        weight_format.quantise(layer)


def quantise_shapes(module: nn.Module, quantization: str, processor: Processor) -> None:
    """Give linear layers on the meta device the shapes that `quantise_weights` would make.

    Args:
        module: The transformers model, on the meta device.
        quantization: "int8wo", "int4wo" or "fp8".
        processor: The GPU that is to compute the model.

    Raises:
        ConfigError: As `quantise_weights`.
    """
    layers = _linear_layers(module, quantization)
    weight_format = _choose(quantization, layers, processor)
    for _, layer in layers:
        weight_format.quantise_shape(layer)


def describe_quantisation(quantization: str, processor: Processor, dtype: torch.dtype) -> str:
    """What is computed with such weights, for people.

    Args:
        quantization: "int8wo", "int4wo" or "fp8".
        processor: What computes the model.
        dtype: Of activations.
    """
    if quantization == "fp8" and _multiplies_float8(processor, dtype):
        return "weights and activations of linear layers in float8"
    bits = "4 bits" if quantization == "int4wo" else "8 bits"
    name = str(dtype).removeprefix("torch.")
    return f"weights of linear layers in {bits}, computed in {name}"


class _WeightFormat(ABC):
    """One way to store a matrix in fewer bits."""

    def check(self, layers: Layers) -> None:  # noqa: B027
        """Raise a ConfigError that names the first layer that cannot be stored so."""

    @abstractmethod
    def config(self) -> Any:
        """What torchao's `quantize_` is to do."""

    def quantise(self, layer: nn.Linear) -> None:
        """Store a layer's weights so, where they lie."""
        from torchao.quantization import quantize_  # noqa: PLC0415

        quantize_(layer, self.config())

    def quantise_shape(self, layer: nn.Linear) -> None:
        """Do the same on the meta device, whatever hardware there is."""
        self.quantise(layer)


class _Int8(_WeightFormat):
    """Symmetric, a float32 scale for each row; expanded before every product."""

    def config(self) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig  # noqa: PLC0415

        return Int8WeightOnlyConfig(set_inductor_config=False)


class _Float8Weights(_WeightFormat):
    """A float32 scale for each row; expanded before every product."""

    def config(self) -> Any:
        from torchao.quantization import Float8WeightOnlyConfig  # noqa: PLC0415

        return Float8WeightOnlyConfig(set_inductor_config=False)


class _Float8Products(_WeightFormat):
    """Products of float8 and float8, with a float32 scale for each row and for each token.

    One scale for all tokens of a step, torchao's default, would let what a request gets depend on
    the others in its batch.
    """

    MULTIPLE = 16

    def check(self, layers: Layers) -> None:
        for name, layer in layers:
            if layer.in_features % self.MULTIPLE or layer.out_features % self.MULTIPLE:
                raise ConfigError(
                    f"quantization fp8 needs layers of a multiple of {self.MULTIPLE} inputs and "
                    f"outputs, and {name} has {layer.in_features} and {layer.out_features}",
                    "quantization",
                )

    def config(self) -> Any:
        from torchao.quantization import (  # noqa: PLC0415
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
        )

        return Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), set_inductor_config=False
        )

    def quantise_shape(self, layer: nn.Linear) -> None:
        from torchao.quantization import Float8Tensor, PerRow  # noqa: PLC0415
        from torchao.quantization.quantize_.workflows import (  # noqa: PLC0415
            QuantizeTensorToFloat8Kwargs,
        )

        config = self.config()
        made = Float8Tensor.from_hp(
            layer.weight,
            float8_dtype=config.weight_dtype,
            granularity=PerRow(),
            mm_config=config.mm_config,
            act_quant_kwargs=QuantizeTensorToFloat8Kwargs(config.activation_dtype, PerRow()),
        )
        layer.weight = nn.Parameter(made, requires_grad=False)


@dataclass(frozen=True, slots=True)
class _Int4Cpu(_WeightFormat):
    """PyTorch's kernel for CPUs."""

    group_size: int

    ROWS = 16

    def check(self, layers: Layers) -> None:
        for name, layer in layers:
            if layer.out_features % self.ROWS:
                raise ConfigError(
                    f"quantization int4wo on a CPU needs layers of a multiple of {self.ROWS} "
                    f"outputs, and {name} has {layer.out_features}",
                    "quantization",
                )

    def config(self) -> Any:
        from torchao.prototype.quantization.int4 import (  # noqa: PLC0415
            PrototypeInt4WeightOnlyConfig,
        )

        return PrototypeInt4WeightOnlyConfig(group_size=self.group_size, set_inductor_config=False)


@dataclass(frozen=True, slots=True)
class _Int4Cuda(_WeightFormat):
    """PyTorch's kernel for tensor cores, which reads tiles of a padded matrix."""

    group_size: int

    def config(self) -> Any:
        from torchao.quantization import Int4WeightOnlyConfig  # noqa: PLC0415
        from torchao.quantization.quantize_.workflows import Int4PackingFormat  # noqa: PLC0415

        return Int4WeightOnlyConfig(
            group_size=self.group_size,
            int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D,
            set_inductor_config=False,
        )

    def quantise_shape(self, layer: nn.Linear) -> None:
        from torchao.quantization import Int4TilePackedTo4dTensor  # noqa: PLC0415

        weight = layer.weight
        rows = -(-weight.shape[0] // 8) * 8
        columns = -(-weight.shape[1] // 1024) * 1024
        made = Int4TilePackedTo4dTensor(
            # A tile is 8 rows of 128 columns: 32 lanes of 4 words of 8 elements.
            weight.new_empty(rows // 8, columns // 128, 32, 4, dtype=torch.int32),
            weight.new_empty(columns // self.group_size, rows, 2),
            [1, self.group_size],
            weight.shape,
        )
        layer.weight = nn.Parameter(made, requires_grad=False)


def _linear_layers(module: nn.Module, quantization: str) -> Layers:
    """The layers to store in fewer bits, by their names.

    Raises:
        ConfigError: There are none, or the model has experts, which are no linear layers.
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim > 2:
            raise ConfigError(
                f"quantization {quantization} is for linear layers, and {name} is none: models "
                "with experts are not supported",
                "quantization",
            )
    output = module.get_output_embeddings()  # type: ignore[operator]
    layers = [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer is not output
    ]
    if not layers:
        raise ConfigError(
            f"quantization {quantization} is for linear layers, and {type(module).__name__} has "
            "none",
            "quantization",
        )
    return layers


def _choose(quantization: str, layers: Layers, processor: Processor) -> _WeightFormat:
    try:
        import torchao  # noqa: F401, PLC0415
    except ImportError as error:
        raise ConfigError(
            f"quantization {quantization} needs torchao: pip install 'headlong[quantization]'",
            "quantization",
        ) from error
    dtype = layers[0][1].weight.dtype
    chosen: _WeightFormat
    if quantization == "int8wo":
        chosen = _Int8()
    elif quantization == "fp8":
        products = _multiplies_float8(processor, dtype)
        chosen = _Float8Products() if products else _Float8Weights()
    else:
        _check_bfloat16(dtype)
        group_size = _group_size(layers)
        on_cpu = processor.kind == "cpu"
        chosen = _Int4Cpu(group_size) if on_cpu else _Int4Cuda(group_size)
    chosen.check(layers)
    return chosen


def _multiplies_float8(processor: Processor, dtype: torch.dtype) -> bool:
    # With a scale for each row, torchao multiplies float8 for bfloat16 alone.
    return (
        processor.kind == "cuda"
        and processor.capability >= FLOAT8_PRODUCTS
        and dtype == torch.bfloat16
    )


def _check_bfloat16(dtype: torch.dtype) -> None:
    # The kernel of GPUs takes nothing else, and that of CPUs is hundreds of times slower in it.
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"quantization int4wo computes in bfloat16, and the weights are {name}: choose dtype "
            "bfloat16",
            "dtype",
        )


def _group_size(layers: Layers) -> int:
    """The largest size of a group that divides the rows of every layer."""
    least = INT4_GROUP_SIZES[-1]
    for name, layer in layers:
        if layer.in_features % least:
            raise ConfigError(
                f"quantization int4wo needs layers of a multiple of {least} inputs, and {name} "
                f"has {layer.in_features}",
                "quantization",
            )
    return next(
        size
        for size in INT4_GROUP_SIZES
        if not any(layer.in_features % size for _, layer in layers)
    )
