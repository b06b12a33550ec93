"""Counting live tensors: by hand, and against PyTorch's own profiler."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from headlong.server.engine.live_bytes import LiveBytes, peak_bytes
from headlong.server.engine.memory import run_largest_step
from support.engines import build_engine
from support.tiny_models import CONFIGS

DEVICES = ["cpu", "meta"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_tensor_counts_while_it_lives(device: str) -> None:
    counter = LiveBytes()
    with counter:
        first = torch.zeros(100, device=device)
        second = first + 1
        assert counter.live_bytes == 800
        del first
        third = second * 2
    assert counter.live_bytes == 800
    assert counter.peak_bytes == 800
    del second, third
    assert counter.live_bytes == 0


@pytest.mark.parametrize("device", DEVICES)
def test_views_and_what_was_there_before_count_nothing(device: str) -> None:
    before = torch.zeros(10, 10, device=device)
    counter = LiveBytes()
    with counter:
        view = before.t()[2:].reshape(-1, 4, 2)[:, 1]
        before.add_(1)
        assert counter.peak_bytes <= 320  # reshape has to copy
        made = torch.ones(8, device=device)
        half = made.view(2, 4)[0]
        live = counter.live_bytes
        del made
        assert counter.live_bytes == live
    del view, half
    assert counter.live_bytes == 0


@pytest.mark.parametrize("device", DEVICES)
def test_the_most_at_once_is_kept(device: str) -> None:
    def call() -> torch.Tensor:
        wide = torch.zeros(1000, device=device)
        narrow = wide.sum()
        del wide
        return narrow + torch.zeros(10, device=device)

    assert peak_bytes(call) == 4004


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_of_experts_have_shapes_in_every_dtype(dtype: torch.dtype) -> None:
    left = torch.empty(16, 32, device="meta", dtype=dtype)
    right = torch.empty(4, 32, 8, device="meta", dtype=dtype)
    ends = torch.empty(4, device="meta", dtype=torch.int32)
    with LiveBytes():
        made = torch.nn.functional.grouped_mm(left, right, offs=ends)
    assert made.shape == (16, 8)
    assert made.dtype == dtype


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "gpt_oss"])
def test_the_profiler_sees_the_same_peak(tiny_model: Callable[[str], Path], name: str) -> None:
    """Against allocations that PyTorch itself reports, inside operations too."""
    assert name in CONFIGS
    model = build_engine(tiny_model(name)).model
    counted = peak_bytes(lambda: run_largest_step(model, 256, 8))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = run_largest_step(model, 256, 8)
    assert result.shape[0] == 256
    live = most = 0
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(events, key=lambda each: each.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()  # type: ignore[attr-defined]
            most = max(most, live)
    assert most == pytest.approx(counted, rel=0.02)
