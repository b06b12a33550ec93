"""Part "prefill": the engine end to end, one long prompt in chunks, to its first token.

Prompts are random, and a step is waited for before the next begins, so that a run out of time can
stop between two of them.
"""

import time
from dataclasses import dataclass
from functools import partial

import torch
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
from gpu_paged import Chunk, visible_pairs
from gpu_session import Entry, Session

from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams

PART = "prefill"

START_S = 5.0
ASSUMED_FLOPS_PER_S = 350e12
"""To guess how long a prompt takes; one that takes longer is stopped when the time is up."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One prompt."""

    shape: ModelShape
    tokens: int
    retrieval: float

    @property
    def name(self) -> str:
        return f"{self.shape.name} {short(self.tokens)} retrieval {self.retrieval:.0%}"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured; the most important cells first."""

    cells: tuple[Cell, ...]
    kind: EngineKind


REAL = Settings(
    cells=(
        Cell(LLAMA_3_8B, 320 * K, 1.0),
        Cell(LLAMA_3_8B, 320 * K, 0.5),
        Cell(LLAMA_2_7B, 128 * K, 1.0),
        Cell(LLAMA_2_7B, 128 * K, 0.25),
        Cell(LLAMA_2_7B, 128 * K, 0.5),
        Cell(LLAMA_3_8B, 128 * K, 1.0),
        Cell(LLAMA_3_8B, 128 * K, 0.5),
        Cell(LLAMA_3_8B, 128 * K, 0.25),
        Cell(LLAMA_3_8B, 320 * K, 0.25),
    ),
    kind=EngineKind(max_num_batched_tokens=32 * K),
)
DRY = Settings(cells=(Cell(DRY_SHAPE, 40, 1.0), Cell(DRY_SHAPE, 40, 0.5)), kind=DRY_ENGINES)


def run(session: Session, settings: Settings) -> None:
    models = Models(settings.kind, session.device)
    for cell in settings.cells:
        load_s = 0.0 if models.has(cell.shape) else LOAD_S
        session.measure(
            PART,
            cell.name,
            partial(prefill, session, models, cell),
            needs_s=START_S + load_s + prefill_flops(cell) / ASSUMED_FLOPS_PER_S,
        )


def prefill_flops(cell: Cell) -> float:
    """Operations of attention and of all layers' matrices; streaming heads count as free."""
    config = cell.shape.config
    pairs = visible_pairs(Chunk(0, cell.tokens), bound=cell.tokens)
    attention = 4 * config["hidden_size"] * cell.shape.num_layers * pairs * cell.retrieval
    return attention + 2 * cell.shape.num_weights * cell.tokens


def prefill(session: Session, models: Models, cell: Cell) -> Entry:
    """Time a prompt up to its first token."""
    model = models.take(cell.shape)
    engine = model.engine(cell.retrieval, cell.tokens + 2, eager=True)
    prompt = torch.randint(engine.model.vocab_size, (cell.tokens,)).tolist()
    session.device.reset_peak()
    session.device.synchronize()
    start = time.perf_counter()
    engine.add_request(
        EngineRequest(
            "prefill", prompt, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        )
    )
    (sequence,) = engine.scheduler.waiting
    while engine.has_work:
        outputs = engine.step()
        session.device.synchronize()
        took_s = time.perf_counter() - start
        if engine.has_work:
            done = f"{sequence.num_computed_tokens} of {cell.tokens} tokens"
            session.check_time(f"{done} and {took_s:.1f} s")
    (output,) = outputs
    if output.error is not None:
        raise RuntimeError(output.error)
    return {
        "model": cell.shape.name,
        "heads": cell.shape.heads,
        "tokens": cell.tokens,
        "chunk_tokens": model.kind.max_num_batched_tokens,
        "retrieval": cell.retrieval,
        "total_s": took_s,
        "tokens_per_s": cell.tokens / took_s,
        "peak_bytes": session.device.peak_bytes(),
        "cache_bytes": engine.arena.layout.total_bytes,
    }
