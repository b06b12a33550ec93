"""Part "tuning", only when it is asked for: the kernels with other tiles than the launchers choose.

First the tile of keys, the warps and the depth of the pipeline, all with each other; then, for
decode, programs and the length of splits around the best of these. A form whose output is far from
that of the launchers' own is reported as failed, one that takes too much shared memory as an error.
"""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING
from unittest import mock

import torch
from gpu_layers import (
    DRY_KIND,
    DecodeShape,
    K,
    Kind,
    PagedLayers,
    PrefillShape,
    decode_layers,
    prefill_layer,
)
from gpu_paged import GQA, HeadShape
from gpu_session import Entry, Session

if TYPE_CHECKING:
    from headlong.kernels.triton_variant import Variant

PART = "tuning"

FARTHEST = 2e-2
"""Largest relative difference of outputs, which bfloat16 explains."""

Change = Mapping[str, int]
"""New values by name: of a constexpr, "num_warps" or "num_stages", or of a constant of a module."""

MODULE_CONSTANTS = ("SPLIT_KEYS", "PROGRAMS_PER_MULTIPROCESSOR")


@dataclass(frozen=True, slots=True)
class Settings:
    """What is tried; `retrieval` is the share of retrieval heads of both shapes."""

    decode: DecodeShape
    prefill: PrefillShape
    decode_tiles: tuple[Change, ...]
    decode_splits: tuple[Change, ...]
    prefill_tiles: tuple[Change, ...]
    kind: Kind = field(default_factory=Kind)
    block_size: int = 16
    retrieval: float = 1.0


def _grid(**values: tuple[int, ...]) -> tuple[Change, ...]:
    """All combinations."""
    combinations = itertools.product(*values.values())
    return tuple(dict(zip(values, each, strict=True)) for each in combinations)


REAL = Settings(
    decode=DecodeShape(GQA, 128 * K, 8),
    prefill=PrefillShape(GQA, 32 * K, 32 * K),
    decode_tiles=_grid(KEYS=(16, 32, 64), num_warps=(2, 4), num_stages=(2, 3, 4)),
    decode_splits=_grid(
        SPLIT_KEYS=(256, 512, 1024), PROGRAMS_PER_MULTIPROCESSOR=(2, 3, 4, 5, 6, 8)
    ),
    prefill_tiles=_grid(ROWS=(64, 128), KEYS=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4)),
)
DRY_HEADS = HeadShape("gqa", num_q_heads=4, num_kv_heads=2, head_dim=16)
DRY = Settings(
    decode=DecodeShape(DRY_HEADS, 70, 1),
    prefill=PrefillShape(DRY_HEADS, 40, 8),
    kind=DRY_KIND,
    decode_tiles=_grid(KEYS=(16,)),
    decode_splits=_grid(SPLIT_KEYS=(64,), PROGRAMS_PER_MULTIPROCESSOR=(2,)),
    prefill_tiles=_grid(ROWS=(32,), num_stages=(2,)),
)


def run(session: Session, settings: Settings) -> None:
    device = session.device.torch_device
    kind, block_size, share = settings.kind, settings.block_size, settings.retrieval
    tuned = Tuned(session, "decode_variant", settings.decode.name)
    tuned.load(lambda: decode_layers(kind, settings.decode, block_size, share, device))
    for change in settings.decode_tiles:
        tuned.measure(change)
    best = tuned.best
    for change in settings.decode_splits:
        tuned.measure({**best, **change})
    tuned = Tuned(session, "prefill_variant", settings.prefill.name)
    tuned.load(lambda: prefill_layer(kind, settings.prefill, block_size, share, device))
    for change in settings.prefill_tiles:
        tuned.measure(change)


class Tuned:
    """One piece of work, done by a kernel in many forms."""

    def __init__(self, session: Session, variant: str, work: str) -> None:
        self.best: Change = {}
        self._session = session
        self._variant = variant
        self._work = work
        self._best_ms = float("inf")

    def load(self, make: Callable[[], PagedLayers]) -> None:
        """Make the layers, and measure the form that the launchers choose."""
        self._session.device.release()
        self._layers = make()
        self._expected = self._layers.run().float()
        self.measure({})

    def measure(self, change: Change) -> None:
        """Measure one form and remember the fastest."""
        shown = " ".join(f"{key.lower()} {value}" for key, value in change.items())
        name = f"{self._work}: {shown or 'as the launchers choose'}"
        entry = self._session.measure(PART, name, partial(self._time, change))
        if entry["status"] == "ok" and entry["median_ms"] < self._best_ms:
            self.best, self._best_ms = change, entry["median_ms"]

    def _time(self, change: Change) -> Entry:
        with changed(self._variant, change):
            self._layers.plan_anew()
            difference = self._difference(self._layers.run())
            recorded = self._session.device.record(self._layers.run)
            timing = self._session.device.time(recorded.replay, least=3, for_s=0.15)
        return {
            "status": "ok" if difference <= FARTHEST else "failed",
            "work": self._work,
            "change": dict(change),
            "difference": difference,
            **timing.per(self._layers.count).entry(),
        }

    def _difference(self, out: torch.Tensor) -> float:
        return float((out.float() - self._expected).norm() / self._expected.norm())


@contextlib.contextmanager
def changed(variant: str, change: Change) -> Iterator[None]:
    """Let the launchers choose another form of a kernel.

    Args:
        variant: "decode_variant" or "prefill_variant".
        change: How it differs.
    """
    others = {key: value for key, value in change.items() if key not in MODULE_CONSTANTS}

    def other(choose: Callable[..., "Variant"]) -> Callable[..., "Variant"]:
        def chosen(*arguments: object, **keywords: object) -> "Variant":
            own = choose(*arguments, **keywords)
            options = {"num_warps": own.num_warps, "num_stages": own.num_stages, **others}
            warps, stages = options.pop("num_warps"), options.pop("num_stages")
            constants = {**own.constants, **options}
            return dataclasses.replace(own, constants=constants, num_warps=warps, num_stages=stages)

        return chosen

    # Every module that took the name at import has one of its own.
    kernels = [module for name, module in sys.modules.items() if "headlong.kernels.triton_" in name]
    with contextlib.ExitStack() as patches:
        for module in kernels:
            for key in MODULE_CONSTANTS:
                if key in change and hasattr(module, key):
                    patches.enter_context(mock.patch.object(module, key, change[key]))
            if hasattr(module, variant):
                replaced = other(getattr(module, variant))
                patches.enter_context(mock.patch.object(module, variant, replaced))
        yield
