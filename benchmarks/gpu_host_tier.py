"""Of part "context": blocks on their way to the host and back, beside the link that they take.

The link is what one plain copy of pinned memory gives, in each direction and in both at once.
Blocks go by the engine's own mover between its own kind of buffer and an arena of a model's layout,
those of the retrieval heads, in an order that no copy likes; a wall clock runs from the first batch
that is asked for to the last that arrived. What comes back must be what went.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from gpu_context_layers import Form, dtype_name
from gpu_device import Timing
from gpu_paged import DUO_ATTENTION, Chunk, HeadShape, Pages, all_heads, build_paged, even_labels
from gpu_session import Entry, Session

from headlong.cache.transfers import Move, Mover, PinnedBuffer, make_mover

Direction = Literal["store", "load", "both"]
"""To the host, to the device, or half of the bytes each way at once."""

DIRECTIONS: tuple[Direction, ...] = ("store", "load", "both")

ARRIVAL_S = 60.0
"""No copy takes so long."""


@dataclass(frozen=True, slots=True)
class TierCell:
    """Blocks of a model's retrieval heads.

    Attributes:
        heads: Of a layer.
        num_layers: Layers.
        retrieval: Share of retrieval heads.
        form: Format of the pages; None for K and V as they are.
        block_size: Tokens of a page.
        dtype: Of K and V as the layers make them.
    """

    heads: HeadShape
    num_layers: int
    form: Form | None
    retrieval: float = 0.5
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16

    @property
    def pages(self) -> Pages:
        """What the pages are."""
        return Pages(self.block_size, self.heads.head_dim, self.dtype, all_heads(self.form))

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        page_bytes = self.pages.page("retrieval").page_bytes
        return round(self.heads.num_kv_heads * self.retrieval) * self.num_layers * page_bytes

    @property
    def name(self) -> str:
        return f"{self.form or 'plain'} block {self.block_size}"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is moved.

    Attributes:
        num_bytes: In all.
        cells: Whose blocks.
        batch_blocks: That the mover is given at a time.
        rounds: Times that each copy is measured, after one that is not.
    """

    num_bytes: int
    cells: tuple[TierCell, ...]
    batch_blocks: int = 64
    rounds: int = 5


def run(session: Session, part: str, settings: Settings) -> None:
    for direction in DIRECTIONS:
        session.measure(part, f"link {direction}", partial(link, session, settings, direction))
    for cell in settings.cells:
        for direction in DIRECTIONS:
            session.measure(
                part,
                f"host tier {direction} {cell.name}",
                partial(tier, session, settings, cell, direction),
            )


def link(session: Session, settings: Settings, direction: Direction) -> Entry:
    """Time plain copies between pinned memory and the device."""
    device = session.device.torch_device
    buffer = PinnedBuffer(settings.num_bytes, pinned=device.type == "cuda")
    try:
        there = torch.zeros(settings.num_bytes, dtype=torch.uint8, device=device)
        half = settings.num_bytes // 2
        out = partial(buffer.memory[:half].copy_, there[:half], non_blocking=True)
        back = partial(there[half:].copy_, buffer.memory[half:], non_blocking=True)
        copies: dict[Direction, tuple[Callable[[], object], ...]] = {
            "store": (partial(buffer.memory.copy_, there, non_blocking=True),),
            "load": (partial(there.copy_, buffer.memory, non_blocking=True),),
            "both": (out, back),
        }
        return {
            "kind": "link",
            "direction": direction,
            **_time(session, settings, partial(session.device.run_beside, copies[direction])),
        }
    finally:
        session.device.synchronize()
        buffer.close()


def tier(session: Session, settings: Settings, cell: TierCell, direction: Direction) -> Entry:
    """Time the mover; fails if blocks come back as others than they went."""
    device = session.device.torch_device
    count = settings.num_bytes // cell.block_bytes
    paged = build_paged(
        even_labels(cell.num_layers, cell.heads.num_kv_heads, cell.retrieval),
        DUO_ATTENTION,
        cell.pages,
        [Chunk(count * cell.block_size - 1, 1)],
        device,
    )
    paged.arena.random_(0, 256)
    blocks = paged.layout.view_group(paged.arena, 0)[:count]
    places = torch.randperm(count).tolist()
    moves = [Move(0, block, place * cell.block_bytes) for block, place in enumerate(places)]
    half, size = count // 2, settings.batch_blocks
    ways: dict[Direction, tuple[list[Move], list[Move]]] = {
        "store": (moves, []),
        "load": ([], moves),
        "both": (moves[:half], moves[half:]),
    }
    host = PinnedBuffer(count * cell.block_bytes, pinned=device.type == "cuda")
    with closing(host), closing(make_mover(paged.arena, paged.layout, host.memory)) as mover:
        expected = blocks.clone()
        _move(mover, moves, [], size)
        timing = _time(
            session,
            settings,
            partial(_move, mover, *ways[direction], size),
            count * cell.block_bytes,
        )
        blocks.zero_()
        session.device.synchronize()
        _move(mover, [], moves, size)
        session.device.synchronize()
        same = torch.equal(blocks, expected)
    return {
        "status": "ok" if same else "failed",
        "why": "" if same else "blocks came back as others than they went",
        "kind": "tier",
        "direction": direction,
        "form": cell.form,
        "dtype": dtype_name(cell.dtype),
        "block_size": cell.block_size,
        "block_bytes": cell.block_bytes,
        "batch_blocks": settings.batch_blocks,
        **timing,
    }


def _move(mover: Mover, stores: list[Move], loads: list[Move], size: int) -> None:
    """Ask for all moves, in batches of `size`, and wait until they have arrived."""
    storing, loading = (_batches(each, size) for each in (stores, loads))
    for index in range(max(len(storing), len(loading))):
        # A load waits for the stores that were asked for before: it comes first.
        if index < len(loading):
            mover.load(loading[index])
        if index < len(storing):
            mover.store(storing[index])
    left = len(storing) + len(loading)
    while left:
        mover.wait(ARRIVAL_S)
        arrived = mover.finished()
        if not arrived:
            raise RuntimeError(f"no block arrived within {ARRIVAL_S:.0f} s")
        left -= len(arrived)


def _batches(moves: list[Move], size: int) -> list[list[Move]]:
    return [moves[first : first + size] for first in range(0, len(moves), size)]


def _time(
    session: Session, settings: Settings, work: Callable[[], object], num_bytes: int | None = None
) -> Entry:
    """Rates by a wall clock, as copies are on streams of their own."""
    times_ms: list[float] = []
    for _ in range(1 + settings.rounds):
        session.device.synchronize()
        start = time.perf_counter()
        work()
        session.device.synchronize()
        times_ms.append(1e3 * (time.perf_counter() - start))
    del times_ms[0]
    timing = Timing(statistics.median(times_ms), min(times_ms), max(times_ms), len(times_ms))
    rate = (settings.num_bytes if num_bytes is None else num_bytes) / timing.median_s
    return {"bytes_per_s": rate, **timing.entry()}
