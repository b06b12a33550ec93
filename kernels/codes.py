"""What quantised K and V are, in plain PyTorch: the one statement of each format.

Of one token and head, with x [head_dim]:

    int8    scale = max|x| / 127            code = x / scale               -127 to 127, in one byte
    fp8     scale = max|x| / 448            code = x / scale               float8 e4m3
    int4    minimum = min(x)                code = (x - minimum) / scale   0 to 15, two in a byte:
            scale = (max(x) - minimum) / 15                                the even one lower

Codes are rounded half to even and clamped. Scales and minima are float16, and codes are made with
what these hold: x is about code * scale + minimum. KIVI (arXiv 2402.02750) quantises keys by
channel instead; `benchmarks/kv_formats.py` has both beside each other.
"""

from dataclasses import dataclass

import torch

from headlong.kernels.layout import Quantisation

_LARGEST = torch.finfo(torch.float16).max
_STEPS = {"int8": 127.0, "fp8": 448.0, "int4": 15.0}


@dataclass(frozen=True, slots=True)
class Codes:
    """Quantised vectors.

    Attributes:
        packed: uint8 [..., packed_bytes].
        scales: float16 [...].
        minima: float16 [...], what code 0 stands for; None for 0.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None


def quantise(x: torch.Tensor, quantisation: Quantisation) -> Codes:
    """Quantise vectors, each on its own.

    Args:
        x: [..., head_dim], in any dtype; computed in float32.
        quantisation: The format.

    Returns:
        The codes. Of a vector with NaN or infinity they mean nothing.
    """
    x = x.float()
    steps = _STEPS[quantisation.name]
    minima = None
    if quantisation.has_minimum:
        minima = x.amin(-1).clamp(-_LARGEST, _LARGEST).half()
        x = x - minima.float()[..., None]
        spread = x.amax(-1)
    else:
        spread = x.abs().amax(-1)
    scales = (spread / steps).clamp(max=_LARGEST).half()
    scale = scales.float()[..., None]
    codes = torch.where(scale > 0, x / scale, 0.0)
    if quantisation.name == "fp8":
        packed = codes.clamp(-steps, steps).to(torch.float8_e4m3fn).view(torch.uint8)
    elif quantisation.name == "int8":
        packed = codes.round().clamp(-steps, steps).to(torch.int8).view(torch.uint8)
    else:
        nibbles = codes.round().clamp(0, steps).to(torch.uint8)
        packed = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    return Codes(packed, scales, minima)


def unpack(packed: torch.Tensor, quantisation: Quantisation) -> torch.Tensor:
    """Codes as numbers.

    Args:
        packed: uint8 [..., packed_bytes].
        quantisation: The format.

    Returns:
        float32 [..., head_dim].
    """
    if quantisation.name == "fp8":
        return packed.view(torch.float8_e4m3fn).float()
    if quantisation.name == "int8":
        return packed.view(torch.int8).float()
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).float()


def dequantise(codes: Codes, quantisation: Quantisation) -> torch.Tensor:
    """What codes stand for, float32 [..., head_dim]."""
    x = unpack(codes.packed, quantisation) * codes.scales.float()[..., None]
    return x if codes.minima is None else x + codes.minima.float()[..., None]
