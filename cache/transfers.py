"""Copies of blocks between the arena and a buffer of the host, beside the computing of steps.

store       arena to host: the next step may overwrite the blocks once `fence` was called
load        host to arena: comes after all stores that were asked for before, so that it may write
            where one of them still reads, or read where one of them still writes

Each direction does its batches in order, and neither waits for the other but for that.
"""

import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from headlong.kernels.layout import ArenaLayout


@dataclass(frozen=True, slots=True)
class Move:
    """One block's way, either way.

    Attributes:
        group: Index of the head group.
        block: In the arena.
        offset: Byte of the host's buffer.
    """

    group: int
    block: int
    offset: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """A batch of blocks that arrived.

    Attributes:
        to_host: Whether it went from the arena to the host.
        moves: Its blocks.
        num_bytes: Their bytes.
        seconds: What the copying took, without what it waited for.
    """

    to_host: bool
    moves: tuple[Move, ...]
    num_bytes: int
    seconds: float


class Mover(ABC):
    """Copies blocks in the background.

    Args:
        arena: uint8 [total_bytes].
        layout: Its map.
        host: uint8 [num_bytes], on the CPU.
    """

    def __init__(self, arena: torch.Tensor, layout: ArenaLayout, host: torch.Tensor) -> None:
        self._layout = layout
        self._host = host
        self._groups = [layout.view_group(arena, group) for group in range(layout.num_groups)]

    def _pair(self, move: Move) -> tuple[torch.Tensor, torch.Tensor]:
        """A block in the arena and in the host's buffer, of one shape."""
        block = self._groups[move.group][move.block]
        slot = self._host.narrow(0, move.offset, block.numel())
        return block, slot.view(block.shape)

    def _size(self, moves: Sequence[Move]) -> int:
        return sum(self._layout.block_bytes(move.group) for move in moves)

    @abstractmethod
    def store(self, moves: Sequence[Move]) -> None:
        """Begin to copy blocks to the host, as all steps up to now have left them."""

    @abstractmethod
    def load(self, moves: Sequence[Move]) -> None:
        """Begin to copy blocks to the arena, where no step reads or writes meanwhile."""

    @abstractmethod
    def fence(self) -> None:
        """Let no step write before the stores that were asked for have read."""

    @abstractmethod
    def finished(self) -> list[Transfer]:
        """Hand out what arrived since the last call, in each direction in order."""

    @abstractmethod
    def wait(self, timeout_s: float) -> None:
        """Return when something has arrived, or nothing is on its way, or the time is over."""

    @abstractmethod
    def close(self) -> None:
        """End what runs and drop what does not yet; nothing is copied after this."""


class ThreadMover(Mover):
    """Copies on two threads, one for each direction, for an arena on the CPU."""

    def __init__(self, arena: torch.Tensor, layout: ArenaLayout, host: torch.Tensor) -> None:
        super().__init__(arena, layout, host)
        self._storing = ThreadPoolExecutor(1, "kv-store")
        self._loading = ThreadPoolExecutor(1, "kv-load")
        self._stores: deque[Future[Transfer]] = deque()
        self._loads: deque[Future[Transfer]] = deque()
        self._last_store: Future[Transfer] | None = None

    def store(self, moves: Sequence[Move]) -> None:
        """As `Mover.store`."""
        self._last_store = self._storing.submit(self._copy_out, tuple(moves))
        self._stores.append(self._last_store)

    def load(self, moves: Sequence[Move]) -> None:
        """As `Mover.load`."""
        self._loads.append(self._loading.submit(self._copy_in, tuple(moves), self._last_store))

    def fence(self) -> None:
        """As `Mover.fence`."""
        if self._last_store is not None:
            self._last_store.result()

    def finished(self) -> list[Transfer]:
        """As `Mover.finished`."""
        done: list[Transfer] = []
        for lane in (self._stores, self._loads):
            while lane and lane[0].done():
                done.append(lane.popleft().result())
        return done

    def wait(self, timeout_s: float) -> None:
        """As `Mover.wait`."""
        first = [lane[0] for lane in (self._stores, self._loads) if lane]
        if first:
            wait(first, timeout_s, FIRST_COMPLETED)

    def close(self) -> None:
        """As `Mover.close`."""
        # A load may wait for a store: those end first.
        self._storing.shutdown(wait=True)
        self._loading.shutdown(wait=True, cancel_futures=True)

    def _copy_out(self, moves: tuple[Move, ...]) -> Transfer:
        return self._copy(moves, to_host=True)

    def _copy_in(self, moves: tuple[Move, ...], after: "Future[Transfer] | None") -> Transfer:
        if after is not None:
            after.result()
        return self._copy(moves, to_host=False)

    def _copy(self, moves: tuple[Move, ...], *, to_host: bool) -> Transfer:
        start = time.perf_counter()
        # The arena may have been made in inference mode, which is each thread's own.
        with torch.inference_mode():
            for move in moves:
                block, slot = self._pair(move)
                if to_host:
                    slot.copy_(block)
                else:
                    block.copy_(slot)
        return Transfer(to_host, moves, self._size(moves), time.perf_counter() - start)


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A batch on a stream, between two events."""

    to_host: bool
    moves: tuple[Move, ...]
    start: torch.cuda.Event
    end: torch.cuda.Event

    def has_ended(self) -> bool:
        """Whether all of it has arrived."""
        return bool(self.end.query())  # type: ignore[no-untyped-call]


class StreamMover(Mover):
    """Copies on two streams, one for each direction, between a CUDA device and pinned memory.

    Args:
        arena: uint8 [total_bytes], on a CUDA device.
        layout: Its map.
        host: uint8 [num_bytes], pinned.
    """

    def __init__(self, arena: torch.Tensor, layout: ArenaLayout, host: torch.Tensor) -> None:
        super().__init__(arena, layout, host)
        self._device = arena.device
        self._out = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._in = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stores: deque[_InFlight] = deque()
        self._loads: deque[_InFlight] = deque()
        self._last_store: torch.cuda.Event | None = None

    def store(self, moves: Sequence[Move]) -> None:
        """As `Mover.store`."""
        batch = self._run(self._out, tuple(moves), to_host=True)
        self._stores.append(batch)
        self._last_store = batch.end

    def load(self, moves: Sequence[Move]) -> None:
        """As `Mover.load`."""
        if self._last_store is not None:
            self._in.wait_event(self._last_store)
        self._loads.append(self._run(self._in, tuple(moves), to_host=False))

    def _run(
        self, stream: torch.cuda.Stream, moves: tuple[Move, ...], *, to_host: bool
    ) -> _InFlight:
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # The steps so far wrote what is stored, and read where it is loaded to.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.inference_mode(), torch.cuda.stream(stream):
            start.record(stream)
            for move in moves:
                block, slot = self._pair(move)
                if to_host:
                    slot.copy_(block, non_blocking=True)
                else:
                    block.copy_(slot, non_blocking=True)
            end.record(stream)
        return _InFlight(to_host, moves, start, end)

    def fence(self) -> None:
        """As `Mover.fence`; the device waits, and not the caller."""
        if self._last_store is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last_store)

    def finished(self) -> list[Transfer]:
        """As `Mover.finished`; the next step comes after what arrived."""
        done: list[Transfer] = []
        for lane in (self._stores, self._loads):
            while lane and lane[0].has_ended():
                batch = lane.popleft()
                seconds = batch.start.elapsed_time(batch.end) / 1000
                size = self._size(batch.moves)
                done.append(Transfer(batch.to_host, batch.moves, size, seconds))
        return done

    def wait(self, timeout_s: float) -> None:
        """As `Mover.wait`."""
        first = [lane[0] for lane in (self._stores, self._loads) if lane]
        over = time.monotonic() + timeout_s
        while first and not any(each.has_ended() for each in first) and time.monotonic() < over:
            # Events cannot be waited for with a limit.
            time.sleep(POLL_S)

    def close(self) -> None:
        """As `Mover.close`."""
        self._out.synchronize()
        self._in.synchronize()


POLL_S = 0.0002
"""How often a stream is asked whether a copy has ended, by one who has nothing else to do."""


class PinnedBuffer:
    """Memory of the host, allocated and touched once, which a CUDA device can copy by itself.

    Args:
        num_bytes: Its size.
        pinned: Whether a CUDA device is to copy from and to it.

    Attributes:
        memory: uint8 [num_bytes].

    Raises:
        MemoryError: There is not so much memory, or it cannot be pinned.
    """

    def __init__(self, num_bytes: int, *, pinned: bool) -> None:
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if num_bytes > has:
            # Linux would hand out more than there is, and end the process when it is touched.
            raise MemoryError(f"{num_bytes} bytes are more than the host's memory of {has}")
        try:
            self.memory = torch.zeros(num_bytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise MemoryError(f"the host's memory does not have {num_bytes} bytes left") from error
        self._registered = False
        if pinned:
            # PyTorch's own pinned memory comes in powers of two: up to twice as much.
            if int(_cudart().cudaHostRegister(self.memory.data_ptr(), num_bytes, 0)) != 0:
                raise MemoryError(f"{num_bytes} bytes of the host's memory cannot be pinned")
            self._registered = True

    def close(self) -> None:
        """Unpin it."""
        if self._registered:
            _cudart().cudaHostUnregister(self.memory.data_ptr())
            self._registered = False


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def make_mover(arena: torch.Tensor, layout: ArenaLayout, host: torch.Tensor) -> Mover:
    """The mover for where an arena lies."""
    kind = StreamMover if arena.device.type == "cuda" else ThreadMover
    return kind(arena, layout, host)
