"""Part "decode": the engine end to end, one sequence at a long context, ms a token and peak memory.

Prefill is not measured here, so caches are filled with random values. The cache holds the one
sequence and no more: the peak is weights, cache and the decode step. A step is timed from outside,
from the call to the sampled token on the host.
"""

import statistics
import time
from dataclasses import dataclass
from functools import partial

import torch
from gpu_device import Timing
from gpu_fill import fill_pages
from gpu_layers import K, short
from gpu_models import (
    DRY_ENGINES,
    DRY_SHAPE,
    LLAMA_2_7B,
    LLAMA_3_8B,
    LOAD_S,
    EngineKind,
    Models,
    ModelShape,
)
from gpu_session import Entry, Session

from headlong.server.engine.engine import Engine
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams

PART = "decode"

CELL_S = 6.0
WARM_UP_STEPS = 3
FILL_CHUNK_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Cell:
    """One engine."""

    context: int
    retrieval: float
    eager: bool = False

    @property
    def name(self) -> str:
        how = "eager" if self.eager else "graphs"
        return f"{short(self.context)} retrieval {self.retrieval:.0%} {how}"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured; the most important cells first."""

    cells: tuple[tuple[ModelShape, tuple[Cell, ...]], ...]
    kind: EngineKind
    steps: int


SHARES = (1.0, 0.5, 0.25)
GRAPHS = tuple(Cell(context * K, share) for context in (128, 512, 1024, 32) for share in SHARES)
EAGER = tuple(Cell(context * K, share, eager=True) for context in (128, 32) for share in SHARES)

REAL = Settings(
    cells=((LLAMA_3_8B, (*GRAPHS, *EAGER)), (LLAMA_2_7B, (*GRAPHS, *EAGER))),
    kind=EngineKind(max_num_batched_tokens=2 * K),
    steps=16,
)
DRY = Settings(
    cells=((DRY_SHAPE, (Cell(60, 1.0), Cell(60, 0.5), Cell(60, 0.5, eager=True))),),
    kind=DRY_ENGINES,
    steps=2,
)


def run(session: Session, settings: Settings) -> None:
    models = Models(settings.kind, session.device)
    for shape, cells in settings.cells:
        for cell in cells:
            session.measure(
                PART,
                f"{shape.name} {cell.name}",
                partial(decode, session, settings, models, shape, cell),
                needs_s=CELL_S + (0.0 if models.has(shape) else LOAD_S),
            )


def decode(
    session: Session, settings: Settings, models: Models, shape: ModelShape, cell: Cell
) -> Entry:
    """Time the steps of one sequence and watch memory."""
    model = models.take(shape)
    longest = cell.context + num_tokens(settings.steps)
    engine = model.engine(cell.retrieval, longest, eager=cell.eager)
    return {
        "model": shape.name,
        "heads": shape.heads,
        "retrieval": cell.retrieval,
        "eager": cell.eager,
        **time_steps(session, engine, cell.context, settings.steps),
    }


def num_tokens(steps: int) -> int:
    """Tokens that an engine must hold beside the context, for so many steps."""
    return WARM_UP_STEPS + steps + 1


def time_steps(session: Session, engine: Engine, context: int, steps: int) -> Entry:
    """Time an engine's steps after a context of random K and V, and watch memory."""
    fill_pages(engine.arena.layout, engine.arena.memory)
    session.device.reset_peak()
    place_context(engine, context, WARM_UP_STEPS + steps)
    times_ms: list[float] = []
    while engine.has_work:
        start = time.perf_counter()
        output = engine.step()[-1]
        times_ms.append(1e3 * (time.perf_counter() - start))
        if output.error is not None:
            raise RuntimeError(output.error)
    times_ms = times_ms[WARM_UP_STEPS:]
    timing = Timing(statistics.median(times_ms), min(times_ms), max(times_ms), len(times_ms))
    return {
        "context": context,
        "cuda_graphs": engine.uses_cuda_graphs,
        "peak_bytes": session.device.peak_bytes(),
        "cache_bytes": engine.arena.layout.total_bytes,
        **timing.entry(),
    }


def place_context(engine: Engine, context: int, num_steps: int) -> None:
    """Queue a request all of whose prompt but the last token counts as computed."""
    params = SamplingParams(max_tokens=num_steps, temperature=0.0, ignore_eos=True)
    prompt = torch.randint(engine.model.vocab_size, (context,)).tolist()
    engine.add_request(EngineRequest("decode", prompt, params))
    scheduler = engine.scheduler
    (sequence,) = scheduler.waiting
    # Blocks are given and windows move as in prefill, without a forward pass.
    while sequence.num_pending_tokens > 1:
        scheduler.max_num_batched_tokens = min(FILL_CHUNK_TOKENS, sequence.num_pending_tokens - 1)
        scheduler.advance(scheduler.schedule())
