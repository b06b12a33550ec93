"""Compile every kernel as its launcher would, for GPUs that need not be there.

    python -m headlong.kernels.triton_check

prints registers, spilled bytes and shared memory of each variant, and fails if one spills more than
MAX_SPILL_BYTES or needs more shared memory than its GPU gives a program.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headlong.kernels.triton_append import append_variant
from headlong.kernels.triton_bounds import bounds_variant
from headlong.kernels.triton_choice import choose_variant, drift_variant, score_variant
from headlong.kernels.triton_codes import FORMAT_NAMES
from headlong.kernels.triton_decode import decode_variant
from headlong.kernels.triton_merge import merge_variant
from headlong.kernels.triton_prefill import prefill_variant
from headlong.kernels.triton_sums import sums_variant
from headlong.kernels.triton_variant import HEAD_DIMS, Variant

MAX_SPILL_BYTES = 64

SHARED_BYTES = {(8, 0): 163 * 1024, (9, 0): 227 * 1024}
"""Shared memory that a program can have, by compute capability: A100, H100 and H200."""

# Sets of one format.
PLAIN, INT8, FP8, INT4 = (1 << number for number in range(len(FORMAT_NAMES)))

PLAIN_HEADS = (
    *product((torch.bfloat16,), HEAD_DIMS),
    *product((torch.float32,), (16, 32, 64, 128, 256)),
    (torch.float16, 128),
)
"""Dtypes and sizes of heads of plain pages: each size, and each size of tile."""

QUANTISED_HEADS = {
    INT8: ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256)),
    FP8: ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 128)),
    INT4: (
        (torch.bfloat16, 64),
        (torch.bfloat16, 80),
        (torch.bfloat16, 128),
        (torch.bfloat16, 256),
    ),
}
"""Likewise of quantised pages: as many sizes of tile, an odd size, and fp8 for each dtype."""

WARP_SIZE = 32


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: Of a thread.
        spill_bytes: Of a thread, written to memory for want of registers.
        shared_bytes: Of a program.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int

    def problems(self, capability: tuple[int, int]) -> list[str]:
        """Why the kernel is no good on a GPU."""
        found: list[str] = []
        if self.spill_bytes > MAX_SPILL_BYTES:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.shared_bytes > SHARED_BYTES[capability]:
            found.append(f"more shared memory than {SHARED_BYTES[capability]} bytes")
        return found


def all_variants(capability: tuple[int, int]) -> Iterator[Variant]:
    """What stands for all that launchers can choose: each path, each size of tile, each head size.

    Of quantised pages a few sizes of heads. Of capped logits, sets of two formats, chosen pages and
    compensation the usual size, and what takes most registers.
    """
    for spans in (False, True):
        yield choose_variant(spans=spans)
    for dtype, head_dim in PLAIN_HEADS:
        yield append_variant(dtype, head_dim, PLAIN)
        yield merge_variant(dtype, head_dim)
        yield drift_variant(dtype, head_dim)
        for spans in (False, True):
            yield score_variant(dtype, head_dim, spans=spans)
        yield from _attention(dtype, head_dim, PLAIN, capability)
    for formats, heads in QUANTISED_HEADS.items():
        for dtype, head_dim in heads:
            yield append_variant(dtype, head_dim, formats)
            yield from _attention(dtype, head_dim, formats, capability)
    for formats in (PLAIN | INT4, INT8 | INT4):
        yield append_variant(torch.bfloat16, 128, formats)
        yield from _attention(torch.bfloat16, 128, formats, capability)
    for dtype, head_dim in ((torch.float32, 128), (torch.bfloat16, 128), (torch.bfloat16, 256)):
        yield from _attention(dtype, head_dim, PLAIN, capability, softcap=True)
    yield from _summary_variants(capability)
    yield from _choosing_variants(capability)
    yield from _compensated_variants(capability)


def _attention(
    dtype: torch.dtype,
    head_dim: int,
    formats: int,
    capability: tuple[int, int],
    *,
    softcap: bool = False,
    compensated: int = 0,
) -> Iterator[Variant]:
    for make in (decode_variant, prefill_variant):
        yield make(
            dtype,
            head_dim,
            softcap=softcap,
            formats=formats,
            capability=capability,
            compensated=compensated,
        )


def _summary_variants(capability: tuple[int, int]) -> Iterator[Variant]:
    for dtype, head_dim, form in (
        *((torch.bfloat16, head_dim, 0) for head_dim in (16, 64, 80, 128, 256)),
        (torch.float32, 256, 0),
        (torch.float16, 128, 0),
        *((torch.bfloat16, 128, form) for form in range(1, len(FORMAT_NAMES))),
        (torch.bfloat16, 80, FORMAT_NAMES.index("int4")),
    ):
        yield bounds_variant(dtype, head_dim, form, capability)
        yield sums_variant(dtype, head_dim, form, capability)


def _choosing_variants(capability: tuple[int, int]) -> Iterator[Variant]:
    """Only decodes choose; they differ from others by one address."""
    for formats, compensated in (
        (PLAIN, 0),
        (INT8, 0),
        (FP8, 0),
        (INT4, 0),
        (PLAIN | INT4, 0),
        (INT8 | INT4, 0),
        (FP8 | INT4, 0),
        (FP8, FP8),
        (INT4, INT4),
        (PLAIN | INT4, PLAIN | INT4),
        (INT8 | INT4, INT8),
    ):
        yield decode_variant(
            torch.bfloat16,
            128,
            softcap=False,
            formats=formats,
            capability=capability,
            chooses=True,
            compensated=compensated,
        )


def _compensated_variants(capability: tuple[int, int]) -> Iterator[Variant]:
    for head_dim, formats, compensated, softcap in (
        (64, PLAIN, PLAIN, False),
        (128, PLAIN, PLAIN, True),
        (128, INT8, INT8, False),
        (128, FP8, FP8, False),
        (128, INT4, INT4, False),
        (128, PLAIN | INT4, PLAIN, False),
        (128, PLAIN | INT4, PLAIN | INT4, False),
    ):
        yield from _attention(
            torch.bfloat16, head_dim, formats, capability, softcap=softcap, compensated=compensated
        )


def compile_variant(variant: Variant, capability: tuple[int, int]) -> Resources:
    """Compile for a GPU.

    Args:
        variant: What.
        capability: Compute capability of the GPU, a key of `SHARED_BYTES`.

    Returns:
        What it takes.
    """
    number = 10 * capability[0] + capability[1]
    compiled = triton.compile(
        ASTSource(
            fn=variant.kernel,
            signature=variant.signature(),
            constexprs=dict(variant.constants),
            attrs={(index,): [["tt.divisibility", 16]] for index in variant.divisible_arguments()},
        ),
        target=GPUTarget("cuda", number, WARP_SIZE),
        options=variant.options,
    )
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", str(cubin))
        registers, stack = (int(_search(rf"{name}:(\d+)", usage)) for name in ("REG", "STACK"))
        spilled = 0
        if stack:
            # What is on the stack may also be something else: only the assembler tells.
            ptx = Path(scratch) / "kernel.ptx"
            ptx.write_text(compiled.asm["ptx"], encoding="utf-8")
            report = _assemble(ptx, _search(r"\.target (sm_\w+)", compiled.asm["ptx"]))
            spilled = int(_search(r"(\d+) bytes spill stores", report))
    return Resources(registers, spilled, int(compiled.metadata.shared))


def _assemble(ptx: Path, arch: str) -> str:
    """The assembler's report; Triton brings two, and takes the newer for some GPUs."""
    for tool in ("ptxas", "ptxas-blackwell"):
        try:
            return _run(tool, "-v", f"--gpu-name={arch}", str(ptx), "-o", "/dev/null")
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            failure = error
    raise failure


def _run(tool: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _search(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern!r} in {text!r}"
    return found[1]


def _check(capability: tuple[int, int], index: int) -> tuple[str, bool]:
    """A line of the table, and whether the variant is good."""
    variant = list(all_variants(capability))[index]
    taken = compile_variant(variant, capability)
    problems = taken.problems(capability)
    arch = f"sm_{capability[0]}{capability[1]}"
    line = (
        f"{arch}  {variant.name:<36} {variant.num_warps:>5} {variant.num_stages:>6} "
        f"{taken.registers:>9} {taken.spill_bytes:>7} {taken.shared_bytes:>8}"
    )
    return "  ".join([line, *problems]), not problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Check all variants; the number of bad ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="variants whose names contain this")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)"
    )
    options = parser.parse_args(arguments)
    work = [
        (capability, index)
        for capability in SHARED_BYTES
        for index, variant in enumerate(all_variants(capability))
        if options.only in variant.name
    ]
    print(f"arch   {'variant':<36} warps stages registers spilled   shared")
    bad = 0
    # PyTorch's threads do not live through a fork.
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for line, good in pool.map(_check, *zip(*work, strict=True)):
            print(line, flush=True)
            bad += not good
    print(f"{len(work)} variants compiled, {bad} of them bad")
    return bad


if __name__ == "__main__":
    sys.exit(min(main(), 1))
