"""The work that is timed: layers that decode by turns, and a layer that prefills a chunk."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from gpu_paged import DUO_ATTENTION, Chunk, HeadShape, Pages, build_paged, even_labels

from headlong.cache.policy import HeadPolicy
from headlong.kernels.backend import make_backend
from headlong.kernels.batch import SelectionSettings

if TYPE_CHECKING:
    from headlong.kernels.triton_plan import TritonPlan

K = 1024


@dataclass(frozen=True, slots=True)
class Kind:
    """What all layers have in common.

    Attributes:
        streaming: What heads keep that are not retrieval heads.
        dtype: Of q, K and V.
        least_bytes: That layers taking turns read together: many times an L2.
        most_layers: That take turns.
    """

    streaming: HeadPolicy = DUO_ATTENTION
    dtype: torch.dtype = torch.bfloat16
    least_bytes: int = 1 << 29
    most_layers: int = 16


DRY_KIND = Kind(HeadPolicy(sink_size=4, window_size=8), torch.float32, least_bytes=1)


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """`batch` sequences of `context` tokens each decode one."""

    heads: HeadShape
    context: int
    batch: int

    @property
    def name(self) -> str:
        return f"decode {self.heads.name} {self.batch} x {short(self.context)}"

    def num_layers(self, kind: Kind, retrieval: float) -> int:
        """Layers that take turns."""
        row = 2 * self.heads.num_kv_heads * self.heads.head_dim * kind.dtype.itemsize
        layer_bytes = self.batch * self.context * row * retrieval
        return max(2, min(kind.most_layers, int(kind.least_bytes / layer_bytes) + 1))


@dataclass(frozen=True, slots=True)
class PrefillShape:
    """The last `chunk` tokens of a context."""

    heads: HeadShape
    context: int
    chunk: int

    @property
    def name(self) -> str:
        return f"prefill {self.heads.name} {short(self.chunk)} of {short(self.context)}"


class PagedLayers:
    """Layers alike over one arena of random K and V.

    Args:
        kind: What they have in common.
        heads: Of each layer.
        chunks: The batch.
        count: Layers.
        pages: What the pages are.
        retrieval: Share of retrieval heads.
        device: Where they are.
        selection: How pages are chosen; None if no batch asks for it.

    Attributes:
        backend: Appends and attends.
    """

    def __init__(
        self,
        kind: Kind,
        heads: HeadShape,
        chunks: list[Chunk],
        *,
        count: int,
        pages: Pages,
        retrieval: float,
        device: torch.device,
        selection: SelectionSettings | None = None,
    ) -> None:
        self.heads = heads
        self.count = count
        self.paged = build_paged(
            even_labels(count, heads.num_kv_heads, retrieval),
            kind.streaming,
            pages,
            chunks,
            device,
        )
        self.paged.fill()
        self._selection = selection
        num_tokens = sum(chunk.new for chunk in chunks)
        self.query = torch.randn(
            heads.num_q_heads, num_tokens, heads.head_dim, dtype=kind.dtype, device=device
        )
        self.plan_anew()

    def plan_anew(self) -> None:
        """Take the kernels' constants as they now are."""
        arena, layout = self.paged.arena, self.paged.layout
        self.backend = make_backend(
            "triton", arena, layout, self.heads.num_q_heads, self._selection
        )
        self._plan = self.backend.plan(self.paged.batch)

    def run(self) -> torch.Tensor:
        """Attend in every layer; what the last one gives."""
        return self.attend(self._plan)

    def attend(self, plan: "TritonPlan") -> torch.Tensor:
        """Attend in every layer by another plan; what the last one gives."""
        sm_scale = self.heads.head_dim**-0.5
        outs = [
            self.backend.attend(layer, self.query, plan, sm_scale=sm_scale)
            for layer in range(self.count)
        ]
        return outs[-1]

    @cached_property
    def read_bytes(self) -> int:
        """Bytes of K and V that decoding must read in one layer."""
        return self.paged.read_bytes(0)

    @cached_property
    def flops(self) -> int:
        """Operations of attention in one layer."""
        return self.paged.attention_flops(0, self.heads.group_size)


def decode_layers(
    kind: Kind, shape: DecodeShape, block_size: int, retrieval: float, device: torch.device
) -> PagedLayers:
    """Layers of which none finds its pages in the L2."""
    return PagedLayers(
        kind,
        shape.heads,
        [Chunk(shape.context - 1, 1)] * shape.batch,
        count=shape.num_layers(kind, retrieval),
        pages=Pages(block_size, shape.heads.head_dim, kind.dtype),
        retrieval=retrieval,
        device=device,
    )


def prefill_layer(
    kind: Kind, shape: PrefillShape, block_size: int, retrieval: float, device: torch.device
) -> PagedLayers:
    """One layer, whose work is long enough."""
    return PagedLayers(
        kind,
        shape.heads,
        [Chunk(shape.context - shape.chunk, shape.chunk)],
        count=1,
        pages=Pages(block_size, shape.heads.head_dim, kind.dtype),
        retrieval=retrieval,
        device=device,
    )


def short(tokens: int) -> str:
    """131072 is "128k", 40 is "40"."""
    return f"{tokens // K}k" if tokens >= K and tokens % K == 0 else str(tokens)
