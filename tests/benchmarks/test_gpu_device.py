"""The clock of a CUDA device, with CUDA itself played by a small stand-in."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from gpu_device import CudaDevice


class Clock:
    """Time that passes when work is done."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.captures = True
        self.replays = 0
        self.stream_put_back = False

    def work(self) -> None:
        self.now_ms += 2.0

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", self.now_ms)
        event.elapsed_time = lambda later: later.at - event.at
        return event

    def graph(self) -> SimpleNamespace:
        def replay() -> None:
            self.replays += 1

        return SimpleNamespace(replay=replay)

    def capture(self, graph: object) -> nullcontext[None]:
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        return nullcontext()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    own = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "current_device": lambda: 0,
        "synchronize": lambda: None,
        "Event": clock.event,
        "Stream": lambda: own,
        "current_stream": lambda: stream,
        "set_stream": lambda chosen: setattr(clock, "stream_put_back", chosen is stream),
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": clock.graph,
        "graph": clock.capture,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return clock


def test_time_is_that_of_one_repeat(clock: Clock) -> None:
    timing = CudaDevice().time(clock.work, least=3, most=40, for_s=0.02)
    assert (timing.median_ms, timing.min_ms, timing.max_ms) == (2.0, 2.0, 2.0)
    assert timing.repeats == 10
    assert timing.median_s == pytest.approx(2e-3)
    assert timing.per(4).median_ms == 0.5


def test_recorded_work_is_replayed_as_a_graph(clock: Clock) -> None:
    recorded = CudaDevice().record(clock.work)
    assert recorded.method == "graph"
    recorded.replay()
    assert clock.replays == 1


def test_work_that_cannot_be_captured_is_launched_again(clock: Clock) -> None:
    clock.captures = False
    recorded = CudaDevice().record(clock.work)
    assert recorded.method == "launches"
    assert clock.stream_put_back
    before = clock.now_ms
    recorded.replay()
    assert clock.now_ms == before + 2.0


def test_work_that_runs_beside_other_work_has_a_stream_of_its_own(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def stream() -> SimpleNamespace:
        number = len(done)
        done.append("made")
        return SimpleNamespace(
            number=number, synchronize=lambda: done.append(f"{number} is waited for")
        )

    @contextmanager
    def current(stream: SimpleNamespace) -> Iterator[None]:
        done.append(f"on {stream.number}")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", current)
    CudaDevice().run_beside([lambda: done.append("out"), lambda: done.append("back")])
    assert done == [
        "made", "made", "on 0", "out", "on 1", "back", "0 is waited for", "1 is waited for",
    ]  # fmt: skip
