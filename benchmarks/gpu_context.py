"""Part "context": what more context costs: K and V in fewer bits, chosen pages, memory of the host.

    layers     attention and append of one layer at 128k and 1M tokens (`gpu_context_layers`)
    host tier  blocks to the host and back, beside the link (`gpu_host_tier`)
    engine     ms a token and peak memory at 128k and 1M tokens (`gpu_context_engine`)

The most important of each come first; what is told by fewer readers comes after all three.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import gpu_host_tier
from gpu_context_engine import EngineCell, decode
from gpu_context_layers import Form, LayerCell, append, attend
from gpu_host_tier import TierCell
from gpu_layers import DRY_KIND, K, Kind
from gpu_models import DRY_ENGINES, DRY_SHAPE, LLAMA_3_8B, LOAD_S, EngineKind, Models, ModelShape
from gpu_paged import GQA, HeadShape
from gpu_session import Session

PART = "context"

LAYER_S = 4.0
"""A layer's time, most of which is for compiling its kernels, and for filling 8 GiB."""

ENGINE_S = 8.0

LONG, LONGER = 128 * K, 1024 * K
BUDGET = 4096
FORMS: tuple[Form | None, ...] = (None, "int4", "int8", "fp8")


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured; the most important cells first.

    Attributes:
        attention: Cells of the layers' attention.
        appends: Likewise, of their append.
        tiers: Copies to the host and back.
        engines: Of `shape`.
        more_attention: As `attention`, at the end.
        shape: The engines' model.
        steps: That an engine is timed for.
        kind: Of all layers.
        engine_kind: Of all engines.
    """

    attention: tuple[LayerCell, ...]
    appends: tuple[LayerCell, ...]
    tiers: gpu_host_tier.Settings
    engines: tuple[EngineCell, ...]
    more_attention: tuple[LayerCell, ...] = ()
    shape: ModelShape = LLAMA_3_8B
    steps: int = 16
    # Under a budget a layer reads 16 MiB of a sequence at most, and 4 MiB of int4.
    kind: Kind = field(default_factory=lambda: Kind(most_layers=32))
    engine_kind: EngineKind = field(default_factory=lambda: EngineKind(2 * K))


def engine_cells(*contexts: int, budget: int, block_size: int = 64) -> tuple[EngineCell, ...]:
    """Each feature alone and together, over contexts; 8-bit weights come last: they are loaded."""
    kinds = (
        EngineCell("bf16", 0),
        EngineCell("int4", 0, kv_cache_dtype="int4"),
        EngineCell(f"budget {budget}", 0, budget=budget),
        EngineCell(
            f"int4, budget {budget}, compensation", 0,
            kv_cache_dtype="int4", budget=budget, compensation="on",
        ),
        EngineCell("int4, int8 weights", 0, kv_cache_dtype="int4", quantization="int8wo"),
    )  # fmt: skip
    return tuple(
        replace(cell, context=context, block_size=block_size)
        for cells in (kinds[:-1], kinds[-1:])
        for context in contexts
        for cell in cells
    )


_BUDGETED = tuple(
    LayerCell(GQA, context, block_size=block_size, budget=BUDGET, reuse=reuse)
    for context in (LONGER, LONG)
    for block_size in (16, 64)
    for reuse in (1, 4)
)

REAL = Settings(
    attention=(
        *(LayerCell(GQA, context, form=form) for context in (LONGER, LONG) for form in FORMS),
        *_BUDGETED,
        *(LayerCell(GQA, context, block_size=64) for context in (LONGER, LONG)),
    ),
    appends=(
        LayerCell(GQA, LONG),
        LayerCell(GQA, LONG, budget=BUDGET),
        LayerCell(GQA, LONG, form="int4", retrieval=0.5, budget=BUDGET, compensated=True),
        LayerCell(GQA, LONG, batch=8, form="int4", retrieval=0.5, budget=BUDGET, compensated=True),
    ),
    tiers=gpu_host_tier.Settings(
        num_bytes=1 << 30,
        cells=(
            TierCell(GQA, 32, None),
            TierCell(GQA, 32, "int4"),
            TierCell(GQA, 32, "int4", block_size=64),
        ),
    ),
    engines=engine_cells(LONGER, LONG, budget=BUDGET),
    more_attention=(
        *(LayerCell(GQA, LONG, batch=8, form=form) for form in FORMS),
        *(LayerCell(GQA, LONGER, form="int4", budget=BUDGET, block_size=64, reuse=reuse)
          for reuse in (1, 4)),
        *(LayerCell(GQA, LONG, batch=8, budget=BUDGET, reuse=reuse) for reuse in (1, 4)),
        *(LayerCell(GQA, LONGER, form=form, retrieval=0.5) for form in FORMS),
        LayerCell(GQA, LONGER, form="int4", retrieval=0.5, compensated=True),
        *(LayerCell(GQA, LONG, batch=8, form=form, retrieval=0.5) for form in FORMS),
    ),
)  # fmt: skip

DRY_HEADS = HeadShape("gqa", num_q_heads=4, num_kv_heads=2, head_dim=16)
DRY = Settings(
    attention=(
        LayerCell(DRY_HEADS, 100),
        LayerCell(DRY_HEADS, 100, form="int4"),
        LayerCell(DRY_HEADS, 100, budget=64, reuse=2),
    ),
    appends=(LayerCell(DRY_HEADS, 40, form="int4", retrieval=0.5, budget=64, compensated=True),),
    tiers=gpu_host_tier.Settings(
        num_bytes=1 << 16, cells=(TierCell(DRY_HEADS, 2, "int4"),), batch_blocks=4, rounds=1
    ),
    # Everything together, and weights in 8 bits.
    engines=engine_cells(100, budget=64, block_size=8)[-2:],
    more_attention=(
        LayerCell(DRY_HEADS, 40, batch=2, form="fp8", retrieval=0.5, compensated=True),
    ),
    shape=DRY_SHAPE,
    steps=2,
    kind=DRY_KIND,
    engine_kind=DRY_ENGINES,
)


def run(session: Session, settings: Settings) -> None:
    _run_attention(session, settings, settings.attention)
    for cell in settings.appends:
        work = partial(append, session, settings.kind, cell)
        session.measure(PART, f"append {cell.name}", work, needs_s=LAYER_S)
    gpu_host_tier.run(session, PART, settings.tiers)
    _run_engines(session, settings)
    _run_attention(session, settings, settings.more_attention)


def _run_attention(session: Session, settings: Settings, cells: tuple[LayerCell, ...]) -> None:
    for cell in cells:
        work = partial(attend, session, settings.kind, cell)
        session.measure(PART, f"attend {cell.name}", work, needs_s=LAYER_S)


def _run_engines(session: Session, settings: Settings) -> None:
    # Let go of at the end: the layers that follow may want the memory.
    models = Models(settings.engine_kind, session.device)
    for cell in settings.engines:
        load_s = 0.0 if models.has(settings.shape, cell.quantization) else LOAD_S
        work = partial(decode, session, models, settings.shape, cell, settings.steps)
        session.measure(PART, cell.name, work, needs_s=ENGINE_S + load_s)
