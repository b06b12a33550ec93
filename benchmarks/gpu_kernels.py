"""Part "kernels": attention of a layer, ours over pages and torch's over contiguous tensors.

Decode is bound by reading K and V once, so its figure is bytes that must be read over time. Several
layers take turns within one recorded CUDA graph, so that no layer finds its pages in the L2. With
some heads streaming, the ideal is to be faster by as much as there are fewer bytes to read.

Prefill is bound by arithmetic, so its figure is operations over time; pairs that the mask hides are
not counted, ours or torch's.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from gpu_layers import (
    DRY_KIND,
    DecodeShape,
    K,
    Kind,
    PrefillShape,
    decode_layers,
    prefill_layer,
)
from gpu_paged import GQA, MHA, Chunk, HeadShape, visible_pairs
from gpu_peers import DecodePeer, PrefillPeer
from gpu_session import Entry, Session

PART = "kernels"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is timed.

    Attributes:
        decodes: Each with the block sizes to try.
        prefills: Over blocks of `prefill_block_size`.
        retrieval: Shares of retrieval heads, 1 first.
        kind: Of all layers.
    """

    decodes: tuple[tuple[DecodeShape, tuple[int, ...]], ...]
    prefills: tuple[PrefillShape, ...]
    retrieval: tuple[float, ...] = (1.0, 0.5, 0.25)
    prefill_block_size: int = 16
    kind: Kind = field(default_factory=Kind)


REAL = Settings(
    decodes=(
        (DecodeShape(GQA, 128 * K, 8), (16, 64)),
        (DecodeShape(GQA, 128 * K, 1), (16, 64)),
        (DecodeShape(GQA, 32 * K, 8), (16, 64)),
        (DecodeShape(GQA, 32 * K, 1), (16, 64)),
        (DecodeShape(GQA, 512 * K, 1), (16, 64)),
        (DecodeShape(MHA, 128 * K, 8), (16,)),
        (DecodeShape(MHA, 128 * K, 1), (16,)),
        (DecodeShape(MHA, 32 * K, 8), (16,)),
        (DecodeShape(MHA, 32 * K, 1), (16,)),
    ),
    prefills=(
        PrefillShape(GQA, 32 * K, 32 * K),
        PrefillShape(GQA, 128 * K, 32 * K),
        PrefillShape(MHA, 32 * K, 32 * K),
    ),
)
DRY_HEADS = HeadShape("gqa", num_q_heads=8, num_kv_heads=4, head_dim=16)
DRY = Settings(
    retrieval=(1.0, 0.5),
    decodes=((DecodeShape(DRY_HEADS, 40, 2), (16,)),),
    prefills=(PrefillShape(DRY_HEADS, 40, 8), PrefillShape(DRY_HEADS, 8, 8)),
    kind=DRY_KIND,
)


def run(session: Session, settings: Settings) -> None:
    for decode_shape, block_sizes in settings.decodes:
        _run_decodes(session, settings, decode_shape, block_sizes)
    for prefill_shape in settings.prefills:
        _run_prefills(session, settings, prefill_shape)


def _run_decodes(
    session: Session, settings: Settings, shape: DecodeShape, block_sizes: tuple[int, ...]
) -> None:
    for block_size in block_sizes:
        for share in settings.retrieval:
            session.measure(
                PART,
                f"{shape.name} block {block_size} retrieval {share:.0%}",
                partial(decode, session, settings.kind, shape, block_size, share),
            )
    for peer in DecodePeer:
        session.measure(
            PART,
            f"{shape.name} torch {peer.value}",
            partial(decode_peer, session, settings.kind, shape, peer),
        )


def _run_prefills(session: Session, settings: Settings, shape: PrefillShape) -> None:
    for share in settings.retrieval:
        session.measure(
            PART,
            f"{shape.name} retrieval {share:.0%}",
            partial(prefill, session, settings.kind, shape, settings.prefill_block_size, share),
        )
    for peer in PrefillPeer:
        if peer.suits(shape.context, shape.chunk):
            session.measure(
                PART,
                f"{shape.name} torch {peer.value}",
                partial(prefill_peer, session, settings.kind, shape, peer),
            )


def decode(
    session: Session, kind: Kind, shape: DecodeShape, block_size: int, retrieval: float
) -> Entry:
    """Time our attention of one layer."""
    layers = decode_layers(kind, shape, block_size, retrieval, session.device.torch_device)
    recorded = session.device.record(layers.run)
    timing = session.device.time(recorded.replay).per(layers.count)
    return {
        **_of_decode(shape, recorded.method),
        "block_size": block_size,
        "retrieval": retrieval,
        "read_bytes": layers.read_bytes,
        "bytes_per_s": layers.read_bytes / timing.median_s,
        **timing.entry(),
    }


def decode_peer(session: Session, kind: Kind, shape: DecodeShape, peer: DecodePeer) -> Entry:
    """Time torch's attention of one layer, every head being a retrieval head."""
    heads = shape.heads

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=kind.dtype, device=session.device.torch_device)

    query = random(shape.batch, heads.num_q_heads, 1, heads.head_dim)
    kv_shape = shape.batch, heads.num_kv_heads, shape.context, heads.head_dim
    layers = [(random(*kv_shape), random(*kv_shape)) for _ in range(shape.num_layers(kind, 1.0))]

    def work() -> None:
        for key, value in layers:
            peer.attend(query, key, value)

    recorded = session.device.record(work)
    timing = session.device.time(recorded.replay).per(len(layers))
    read_bytes = sum(each.numel() * each.itemsize for each in layers[0])
    return {
        **_of_decode(shape, recorded.method),
        "peer": peer.value,
        "read_bytes": read_bytes,
        "bytes_per_s": read_bytes / timing.median_s,
        **timing.entry(),
    }


def prefill(
    session: Session, kind: Kind, shape: PrefillShape, block_size: int, retrieval: float
) -> Entry:
    """Time our attention of one layer."""
    layer = prefill_layer(kind, shape, block_size, retrieval, session.device.torch_device)
    timing = session.device.time(layer.run, least=3)
    return {
        **_of_prefill(shape),
        "block_size": block_size,
        "retrieval": retrieval,
        "flops": layer.flops,
        "flops_per_s": layer.flops / timing.median_s,
        **timing.entry(),
    }


def prefill_peer(session: Session, kind: Kind, shape: PrefillShape, peer: PrefillPeer) -> Entry:
    """Time torch's attention of one layer, every head being a retrieval head."""
    heads = shape.heads

    def random(num_heads: int, length: int) -> torch.Tensor:
        size = 1, num_heads, length, heads.head_dim
        return torch.randn(size, dtype=kind.dtype, device=session.device.torch_device)

    query = random(heads.num_q_heads, shape.chunk)
    key, value = (random(heads.num_kv_heads, shape.context) for _ in range(2))
    timing = session.device.time(lambda: peer.attend(query, key, value), least=3)
    pairs = visible_pairs(Chunk(shape.context - shape.chunk, shape.chunk), bound=shape.context)
    flops = 4 * heads.head_dim * heads.num_q_heads * pairs
    return {
        **_of_prefill(shape),
        "peer": peer.value,
        "flops": flops,
        "flops_per_s": flops / timing.median_s,
        **timing.entry(),
    }


def _of_decode(shape: DecodeShape, method: str) -> Entry:
    return {
        "kind": "decode",
        "heads": shape.heads.name,
        "context": shape.context,
        "batch": shape.batch,
        "method": method,
    }


def _of_prefill(shape: PrefillShape) -> Entry:
    return {
        "kind": "prefill",
        "heads": shape.heads.name,
        "context": shape.context,
        "chunk": shape.chunk,
    }
