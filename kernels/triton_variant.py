"""A kernel with everything that is fixed when it is compiled: what is launched is what is checked.

A launcher asks its module for the variant of a dtype and a head size; the ahead-of-time check asks
for all of them, and compiles exactly what the launcher would have.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs

HEAD_DIMS = (16, 32, 64, 80, 96, 112, 128, 192, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

TRITON_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

DIVISIBLE = ("_stride",)
"""Ends of names of integer arguments that are multiples of 16, which makes wide loads possible."""


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel.

    Attributes:
        name: For people.
        kernel: The jitted function.
        types: Of the arguments that are not constexpr, in Triton's notation; those that are not
            named here are i32.
        constants: Constexpr arguments.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
        max_registers: Most registers of a thread, so that several programs share a multiprocessor;
            None is as many as there are.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """How Triton is to compile it."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options

    def launch(self, grid: tuple[int, ...], *arguments: object) -> None:
        """Run it; the arguments are those before the constants, in order."""
        self.kernel[grid](*arguments, **self.constants, **self.options)

    def signature(self) -> dict[str, str]:
        """Type of every argument, as `triton.compile` wants it."""
        return {
            name: "constexpr" if name in self.constants else self.types.get(name, "i32")
            for name in self.kernel.arg_names
        }

    def divisible_arguments(self) -> list[int]:
        """Indices of the arguments that are known to be multiples of 16."""
        return [
            index
            for index, (name, kind) in enumerate(self.signature().items())
            if kind.startswith("*") or (kind == "i32" and name.endswith(DIVISIBLE))
        ]


def device_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter runs what a Hopper device would."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def has_fp8(capability: tuple[int, int]) -> bool:
    """Whether there are instructions that convert float8 e4m3."""
    return capability >= (8, 9)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return bool(knobs.runtime.interpret)


def reads_as_float32(dtype: torch.dtype) -> bool:
    """Whether loads must be widened at once: the interpreter has no bfloat16 arithmetic."""
    return dtype == torch.bfloat16 and is_interpreted()


def padded_dim(head_dim: int) -> int:
    """Tile size for a head: the next power of two.

    Raises:
        ValueError: There is no kernel for this head size.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {HEAD_DIMS} for Triton, got {head_dim}")
    return int(triton.next_power_of_2(head_dim))
