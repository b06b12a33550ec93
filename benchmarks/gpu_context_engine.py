"""Of part "context": the engine's decode with what stretches its cache, as in part "decode"."""

from dataclasses import dataclass
from importlib.util import find_spec

from gpu_decode import num_tokens, time_steps
from gpu_layers import short
from gpu_models import Models, ModelShape
from gpu_session import Entry, Session

from headlong.server.engine.engine_config import Compensation, Quantization


@dataclass(frozen=True, slots=True)
class EngineCell:
    """One engine.

    Attributes:
        label: For people, unlike that of any other of its context.
        context: Tokens.
        retrieval: Share of retrieval heads.
        kv_cache_dtype: Format of K and V.
        budget: Most tokens that a retrieval head reads for a new token; None for all.
        compensation: Whether streaming heads keep an entry for what they dropped.
        quantization: Of the weights.
        block_size: Tokens of a page.
    """

    label: str
    context: int
    retrieval: float = 0.5
    kv_cache_dtype: str = "auto"
    budget: int | None = None
    compensation: Compensation = "off"
    quantization: Quantization | None = None
    block_size: int = 64

    @property
    def name(self) -> str:
        return f"engine {short(self.context)} {self.label}"


def decode(
    session: Session, models: Models, shape: ModelShape, cell: EngineCell, steps: int
) -> Entry:
    """Time the steps of one sequence; skipped if its weights need a package that is not here."""
    if cell.quantization is not None and find_spec("torchao") is None:
        return {"status": "skipped", "why": "needs torchao: pip install 'headlong[quantization]'"}
    engine = models.take(shape, cell.quantization).engine(
        cell.retrieval,
        cell.context + num_tokens(steps),
        eager=False,
        kv_cache_dtype=cell.kv_cache_dtype,
        retrieval_budget=cell.budget,
        compensation=cell.compensation,
        block_size=cell.block_size,
    )
    return {
        "kind": "engine",
        "model": shape.name,
        "label": cell.label,
        "retrieval": cell.retrieval,
        "budget": cell.budget,
        **time_steps(session, engine, cell.context, steps),
    }
