"""What a measurement asks of a device: a clock, recorded launches, memory counters.

`Device` is the host. It runs what it is given at once and reads the wall clock, so that every part
of the benchmark can be tried without a GPU; its figures mean nothing. `CudaDevice` is the real one.
"""

import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

Work = Callable[[], object]

WARM_UP_S = 0.05
"""Work before the clock is read: an idle GPU takes a while to raise its clocks."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of the repeats of one piece of work, in milliseconds."""

    median_ms: float
    min_ms: float
    max_ms: float
    repeats: int

    @property
    def median_s(self) -> float:
        return self.median_ms / 1e3

    def per(self, pieces: int) -> "Timing":
        """Of one of so many equal pieces."""
        return Timing(
            self.median_ms / pieces, self.min_ms / pieces, self.max_ms / pieces, self.repeats
        )

    def entry(self) -> dict[str, float]:
        """For the JSON."""
        return {
            "median_ms": self.median_ms,
            "min_ms": self.min_ms,
            "max_ms": self.max_ms,
            "repeats": self.repeats,
        }


@dataclass(frozen=True, slots=True)
class Recorded:
    """Launches to be replayed, and how: by a CUDA graph, or by launching them again."""

    replay: Work
    method: str


class Device:
    """The host, as a stand-in for a GPU."""

    torch_device = torch.device("cpu")

    @property
    def name(self) -> str:
        return f"dry run on {platform.machine()}"

    def describe(self) -> dict[str, object]:
        """What the figures depend on."""
        return {"name": self.name, "multiprocessors": 0, "memory_gib": 0, "l2_bytes": 0}

    def synchronize(self) -> None:
        """Wait for all that was launched."""

    def record(self, work: Work) -> Recorded:
        """Run work once, then make it replayable over the same tensors."""
        work()
        return Recorded(work, "launches")

    def time(self, work: Work, *, least: int = 5, most: int = 50, for_s: float = 0.3) -> Timing:
        """Repeat work for about `for_s` seconds, after a warm-up."""
        start = time.perf_counter()
        work()
        took_ms = 1e3 * (time.perf_counter() - start)
        return Timing(took_ms, took_ms, took_ms, 1)

    def run_beside(self, copies: Sequence[Work]) -> None:
        """Let pieces of work run at once, and wait for all."""
        for work in copies:
            work()

    def reset_peak(self) -> None:
        """Begin to watch memory anew."""

    def peak_bytes(self) -> int:
        """Most memory in use since `reset_peak`."""
        return 0

    def release(self) -> None:
        """Give back what nobody holds any more: before large work, of which a dry run has none."""


class CudaDevice(Device):
    """The current CUDA device."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch_device)

    def describe(self) -> dict[str, object]:
        found = torch.cuda.get_device_properties(self.torch_device)
        return {
            "name": self.name,
            "multiprocessors": found.multi_processor_count,
            "memory_gib": round(found.total_memory / 2**30),
            "l2_bytes": getattr(found, "L2_cache_size", 0),
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def record(self, work: Work) -> Recorded:
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            work()
        current.wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            # A capture that fails can leave its own stream the current one.
            torch.cuda.set_stream(current)
            torch.cuda.synchronize()
            return Recorded(work, "launches")
        return Recorded(graph.replay, "graph")

    def time(self, work: Work, *, least: int = 5, most: int = 50, for_s: float = 0.3) -> Timing:
        self._run(work, 1)
        (first,) = self._run(work, 1)
        self._run(work, min(most, int(WARM_UP_S / max(first, 1e-6))))
        repeats = max(least, min(most, int(for_s / max(first, 1e-6))))
        times = [1e3 * each for each in self._run(work, repeats)]
        return Timing(statistics.median(times), min(times), max(times), repeats)

    def run_beside(self, copies: Sequence[Work]) -> None:
        streams = [torch.cuda.Stream() for _ in copies]
        for stream, work in zip(streams, copies, strict=True):
            with torch.cuda.stream(stream):
                work()
        for stream in streams:
            stream.synchronize()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def release(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def _run(self, work: Work, repeats: int) -> list[float]:
        """Seconds of each repeat."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]
