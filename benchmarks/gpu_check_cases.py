"""What "kernels-check" checks: pages of every format, shapes of heads and windows, budgets."""

from dataclasses import dataclass

import gpu_checkout  # noqa: F401
import torch
from gpu_paged import Chunk, Pages, all_heads

TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}

QUANTISED_TOLERANCE = 2
"""Times these: scales are applied to logits and weights, which is one more rounding."""

DECODES = (1, 15, 16, 17, 255, 257, 1000, 4097)
PREFILLS = (
    Chunk(0, 15), Chunk(0, 16), Chunk(1, 16), Chunk(5, 250), Chunk(0, 257), Chunk(744, 256),
    Chunk(3840, 257), Chunk(1000, 3),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """What varies."""

    dtype: torch.dtype
    head_dim: int
    block_size: int
    group_size: int
    sink_size: int = 4
    window_size: int = 100
    softcap: float | None = None
    learned_sinks: bool = False
    native_window: int | None = None
    formats: tuple[tuple[str, str], ...] = ()
    compensated: bool = False
    budget: int | None = None
    min_similarity: float | None = None
    decodes: tuple[int, ...] = DECODES
    prefills: tuple[Chunk, ...] = PREFILLS

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        extras = [
            f"softcap {self.softcap:g}" if self.softcap else "",
            "learned sinks" if self.learned_sinks else "",
            f"native window {self.native_window}" if self.native_window else "",
            ",".join(f"{kind}={form}" for kind, form in self.formats),
            "compensated" if self.compensated else "",
            f"budget {self.budget}" if self.budget else "",
            f"similarity {self.min_similarity:g}" if self.min_similarity else "",
        ]
        return " ".join(
            [
                f"{dtype} dim {self.head_dim} block {self.block_size} group {self.group_size}",
                f"sink {self.sink_size} window {self.window_size}",
                *filter(None, extras),
            ]
        )

    @property
    def tolerance(self) -> float:
        """Largest relative error of a sequence's attention."""
        return TOLERANCES[self.dtype] * (QUANTISED_TOLERANCE if self.formats else 1)

    @property
    def pages(self) -> Pages:
        """What the pages are."""
        return Pages(
            self.block_size,
            self.head_dim,
            self.dtype,
            self.formats,
            summarised=self.budget is not None,
            compensated=self.compensated,
        )

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """Decodes and chunks by turns, as no scheduler would order them."""
        decodes = [Chunk(length - 1, 1) for length in self.decodes]
        both = [*zip(decodes, self.prefills, strict=False)]
        rest = max(decodes, self.prefills, key=len)[len(both) :]
        return (*(chunk for pair in both for chunk in pair), *rest)


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

_BASE = (
    Case(BF16, 128, 16, 4, sink_size=128, window_size=256),
    Case(FP16, 128, 32, 8, sink_size=0, window_size=1),
    Case(FP32, 128, 64, 1, sink_size=5, window_size=21),
    Case(BF16, 64, 128, 16, sink_size=17, window_size=31),
    Case(FP16, 64, 16, 3, sink_size=16, window_size=5000),
    Case(FP32, 64, 32, 4, sink_size=64, window_size=255),
    Case(BF16, 256, 16, 1),
    Case(BF16, 80, 64, 8, sink_size=0, window_size=64),
    Case(FP16, 32, 32, 3),
    Case(BF16, 64, 16, 8, softcap=30.0, learned_sinks=True),
    Case(FP32, 64, 16, 8, softcap=2.0, learned_sinks=True, sink_size=0),
    Case(FP16, 64, 64, 16, learned_sinks=True, native_window=128),
)  # fmt: skip
_SIZES = tuple(
    Case(BF16, 128, block_size, group_size, sink_size=block_size - 1, window_size=block_size + 1)
    for block_size in (16, 32, 64, 128)
    for group_size in (1, 3, 4, 8, 16)
)
INT8, INT4, FP8 = (all_heads(form) for form in ("int8", "int4", "fp8"))
INT4_AND_INT8 = (("retrieval", "int4"), ("streaming", "int8"))
_LONG_CONTEXT = (
    Case(BF16, 128, 16, 4, formats=INT4, compensated=True, budget=192),
    Case(BF16, 128, 16, 4, compensated=True, budget=192, min_similarity=0.9),
    Case(BF16, 128, 16, 4, formats=FP8, budget=192),
    Case(BF16, 128, 64, 4, formats=INT8, budget=512),
    Case(BF16, 128, 16, 4, formats=INT4_AND_INT8, compensated=True),
    Case(BF16, 128, 16, 8, formats=(("retrieval", "int4"),), sink_size=128, window_size=256),
    Case(FP16, 128, 32, 8, formats=INT4, softcap=30.0),
    Case(FP16, 64, 16, 3, formats=(*FP8, ("sliding", "int8")), native_window=128),
    Case(BF16, 80, 64, 8, formats=INT8, compensated=True, sink_size=17, window_size=31),
    Case(FP32, 64, 16, 4, formats=INT4, compensated=True, budget=160, sink_size=0),
    Case(BF16, 256, 16, 1, formats=INT8),
    Case(BF16, 64, 128, 2, formats=FP8, compensated=True),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """Which cases, by how many processes, and how far away the distant arena's pages lie."""

    cases: tuple[Case, ...] = (*_BASE, *_LONG_CONTEXT, *_SIZES)
    processes: int = 6
    distant_elements: int = 2**31 + 2**28


REAL = Settings()
DRY = Settings(
    cases=tuple(
        Case(
            dtype, 16, 16, group_size, softcap=softcap, learned_sinks=softcap is not None,
            sink_size=3, window_size=18, decodes=(1, 33), prefills=(Chunk(0, 17), Chunk(20, 5)),
        )
        for dtype, group_size, softcap in ((FP32, 3, None), (BF16, 1, 5.0))
    )
    + tuple(
        Case(
            FP32, 16, 8, 2, formats=formats, compensated=compensated, budget=budget,
            min_similarity=None if budget is None else 0.9, sink_size=3, window_size=18,
            decodes=decodes, prefills=(Chunk(20, 5),),
        )
        for formats, compensated, budget, decodes in (
            ((("retrieval", "int8"), ("streaming", "fp8")), False, None, (1, 33)),
            (INT4_AND_INT8, True, 64, (1050, 20)),
        )
    ),
    processes=1,
    distant_elements=1 << 16,
)  # fmt: skip
