"""Of part "context": a layer's decode over quantised pages, over chosen pages, and its append.

As in part "kernels", layers take turns within one recorded CUDA graph, so that none finds its pages
in the L2. Under a budget the graph holds as many steps as share a choice: one that chooses, then
those that keep it. What is appended begins a page, so that sums are written as well as bounds.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from gpu_layers import Kind, PagedLayers, short
from gpu_paged import Chunk, HeadShape, Pages, all_heads
from gpu_session import Entry, Session

from headlong.kernels.batch import SelectionBatch, SelectionSettings

Form = Literal["int8", "fp8", "int4"]

BUDGET_SHARE = 4
"""Under a budget a layer holds far more than it reads: its turns read so many times less, which is
still two to three times an L2."""


@dataclass(frozen=True, slots=True)
class LayerCell:
    """`batch` sequences of `context` tokens each decode one.

    Attributes:
        heads: Of a layer.
        context: Tokens of each sequence.
        batch: Sequences.
        form: Format of all pages; None for K and V as they are.
        retrieval: Share of retrieval heads.
        block_size: Tokens of a page.
        budget: Most tokens that a retrieval head reads; None for all.
        reuse: Steps that share a choice.
        compensated: Whether streaming heads keep an entry for what they dropped.
    """

    heads: HeadShape
    context: int
    batch: int = 1
    form: Form | None = None
    retrieval: float = 1.0
    block_size: int = 16
    budget: int | None = None
    reuse: int = 1
    compensated: bool = False

    @property
    def name(self) -> str:
        parts = [
            f"{self.heads.name} {self.batch} x {short(self.context)} {self.form or 'plain'}",
            f"retrieval {self.retrieval:.0%} block {self.block_size}",
            f"budget {self.budget}" if self.budget else "",
            f"reuse {self.reuse}" if self.reuse > 1 else "",
            "compensated" if self.compensated else "",
        ]
        return " ".join(filter(None, parts))

    def pages(self, kind: Kind) -> Pages:
        """What the pages are."""
        return Pages(
            self.block_size,
            self.heads.head_dim,
            kind.dtype,
            all_heads(self.form),
            summarised=self.budget is not None,
            compensated=self.compensated,
        )

    def num_layers(self, kind: Kind) -> int:
        """Layers that take turns."""
        elements = 2 * self.heads.num_kv_heads * self.heads.head_dim * self.retrieval
        bits = {None: 8 * kind.dtype.itemsize, "int4": 4}.get(self.form, 8)
        tokens = self.batch * min(self.context, self.budget or self.context)
        layer_bytes = tokens * elements * bits / 8
        least_bytes = kind.least_bytes / (1 if self.budget is None else BUDGET_SHARE)
        return max(2, min(kind.most_layers, int(least_bytes / layer_bytes) + 1))

    def entry(self) -> Entry:
        """What tells it from others."""
        return {
            "heads": self.heads.name,
            "context": self.context,
            "batch": self.batch,
            "form": self.form,
            "retrieval": self.retrieval,
            "block_size": self.block_size,
            "budget": self.budget,
            "reuse": self.reuse,
            "compensated": self.compensated,
        }


def attend(session: Session, kind: Kind, cell: LayerCell) -> Entry:
    """Time attention of one layer, choosing included."""
    layers = _make(session, kind, cell, Chunk(cell.context - 1, 1))
    batch = layers.paged.batch
    plans = [
        layers.backend.plan(replace(batch, selection=_selection(cell, renews=step == 0)))
        for step in range(cell.reuse)
    ]

    def work() -> None:
        for plan in plans:
            layers.attend(plan)

    recorded = session.device.record(work)
    timing = session.device.time(recorded.replay).per(layers.count * cell.reuse)
    read_bytes: float = layers.paged.read_bytes(0, cell.budget)
    if cell.budget is not None:
        read_bytes += layers.paged.choice_bytes(0, cell.budget) / cell.reuse
    return {
        "kind": "attend",
        **cell.entry(),
        "dtype": dtype_name(kind.dtype),
        "method": recorded.method,
        "read_bytes": read_bytes,
        "bytes_per_s": read_bytes / timing.median_s,
        **timing.entry(),
    }


def append(session: Session, kind: Kind, cell: LayerCell) -> Entry:
    """Time the append of one layer: K and V in their format, and what their pages say."""
    layers = _make(session, kind, cell, Chunk(cell.context, 1))
    heads, device = cell.heads, session.device.torch_device
    size = heads.num_kv_heads, cell.batch, heads.head_dim
    key, value = (torch.randn(size, dtype=kind.dtype, device=device) for _ in range(2))
    plan = layers.backend.plan(layers.paged.batch)

    def work() -> None:
        for layer in range(layers.count):
            layers.backend.append(layer, key, value, plan)

    recorded = session.device.record(work)
    timing = session.device.time(recorded.replay).per(layers.count)
    return {
        "kind": "append",
        **cell.entry(),
        "dtype": dtype_name(kind.dtype),
        "method": recorded.method,
        **timing.entry(),
    }


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 is "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _make(session: Session, kind: Kind, cell: LayerCell, chunk: Chunk) -> PagedLayers:
    settings = None
    if cell.budget is not None:
        settings = SelectionSettings(cell.budget, 1 + cell.batch, chunk.cached + chunk.new)
    return PagedLayers(
        kind,
        cell.heads,
        [chunk] * cell.batch,
        count=cell.num_layers(kind),
        pages=cell.pages(kind),
        retrieval=cell.retrieval,
        device=session.device.torch_device,
        selection=settings,
    )


def _selection(cell: LayerCell, *, renews: bool) -> SelectionBatch | None:
    if cell.budget is None:
        return None
    return SelectionBatch(
        budgets=torch.full((cell.batch,), cell.budget, dtype=torch.int32),
        places=torch.arange(1, 1 + cell.batch, dtype=torch.int32),
        renews=torch.full((cell.batch,), renews),
    )
