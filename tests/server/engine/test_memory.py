"""The arena's size on a CUDA device: the arithmetic, and what it says."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headlong.kernels.torch_attention import TorchAttention
from headlong.server.engine import memory
from headlong.server.engine.engine import Engine
from headlong.server.engine.memory import (
    DeviceMemory,
    choices_bytes,
    page_formats,
    plan_arena,
    run_without_cache,
)
from headlong.server.engine.model import LoadedModel
from headlong.server.errors import ConfigError
from support.engines import build_engine

GIB = 1 << 30


def card(total: float, used: float, activation: float, sampling: float) -> DeviceMemory:
    return DeviceMemory(*(int(each * GIB) for each in (total, used, activation, sampling)))


@pytest.mark.parametrize(
    ("utilization", "left"), [(1.0, 59.0), (0.75, 39.0), (0.5, 19.0), (0.25, 0.0), (0.01, 0.0)]
)
def test_what_is_left(utilization: float, left: float) -> None:
    assert card(80, 16, 4, 1).cache_bytes(utilization) == left * GIB


def test_more_in_use_leaves_less() -> None:
    base = card(80, 16, 4, 1)
    for name in ("used_bytes", "activation_bytes", "sampling_bytes", "choices_bytes"):
        more = replace(base, **{name: getattr(base, name) + 12345})
        assert more.cache_bytes(0.9) == base.cache_bytes(0.9) - 12345


def test_the_figures_are_told() -> None:
    told = card(80, 16, 4, 1).explain(0.5)
    for figure in ("0.5 of 80.00 GiB is 40.00 GiB", "16.00 GiB", "4.00 GiB", "1.00 GiB"):
        assert figure in told
    assert "leaves 19.00 GiB" in told
    told = replace(card(80, 16, 4, 1), choices_bytes=2 * GIB).explain(0.5)
    assert "sampling 1.00 GiB, chosen pages 2.00 GiB, which leaves 17.00 GiB" in told


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[[str], Path]) -> Engine:
    return build_engine(tiny_model("qwen3"))


@pytest.fixture
def on_cuda(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Bytes of an arena on a pretended card."""

    def arena_bytes(measured: DeviceMemory, **changes: object) -> int:
        monkeypatch.setattr(memory, "_measure", lambda config, model: measured)
        config = replace(engine.config, **({"kv_cache_memory_bytes": None} | changes))  # type: ignore[arg-type]
        model: LoadedModel = replace(engine.model, device=torch.device("cuda", 0))
        return plan_arena(config, model, engine.groups)[0].arena_bytes

    return arena_bytes


def test_the_arena_takes_what_is_left(on_cuda: Callable[..., int]) -> None:
    measured = card(0.01, 0.005, 0.0, 0.0)
    for utilization in (0.8, 1.0):
        left = measured.cache_bytes(utilization)
        taken = on_cuda(measured, gpu_memory_utilization=utilization)
        assert left - 20_000 < taken <= left
    assert on_cuda(measured) == on_cuda(measured, gpu_memory_utilization=0.9)


@pytest.mark.parametrize("similarity", [None, 0.9])
def test_the_pages_that_heads_choose_are_counted(
    tiny_model: Callable[[str], Path], similarity: float | None
) -> None:
    engine = build_engine(
        tiny_model("gemma3"),
        block_size=8,
        retrieval_budget=100,
        selection_reuse_steps=4,
        selection_min_similarity=similarity,
        max_num_seqs=5,
    )
    attention = engine._runner.attention
    assert isinstance(attention, TorchAttention)
    selection = attention.page_selection
    assert selection is not None
    held = (*selection._chosen.values(), *selection._queries.values())
    assert held
    assert choices_bytes(engine.config, engine.model, engine.groups) == sum(
        tensor.nbytes for tensor in held
    )


def test_chosen_pages_leave_less_for_the_arena(engine: Engine, on_cuda: Callable[..., int]) -> None:
    measured = card(0.01, 0.005, 0.0, 0.0)
    small, large = (
        on_cuda(measured, retrieval_budget=budget, max_num_seqs=200) for budget in (128, 1024)
    )
    num_heads = sum(len(group.members) for group in engine.groups)
    # Of 200 sequences, and the one that all share who read everything.
    more = 201 * num_heads * 4 * (1024 - 128) // engine.config.block_size
    assert small - large == pytest.approx(more, abs=20_000)
    assert more > 100_000


def test_bytes_that_are_given_are_not_measured(on_cuda: Callable[..., int]) -> None:
    full = card(1, 1, 1, 1)
    assert 0 < on_cuda(full, kv_cache_memory_bytes=1 << 20) <= 1 << 20


def test_a_card_that_is_too_full(on_cuda: Callable[..., int]) -> None:
    with pytest.raises(ConfigError, match=r"0\.9 of 80\.00 GiB is 72\.00 GiB; 75\.00") as caught:
        on_cuda(card(80, 75, 3, 1))
    assert caught.value.param == "gpu_memory_utilization"
    with pytest.raises(ConfigError, match=r"hold a sequence of .* GiB") as caught:
        on_cuda(card(0.01, 0.0088, 0, 0), max_model_len=2048)
    assert caught.value.param == "max_model_len"


def test_int4_needs_an_even_number_of_elements(engine: Engine) -> None:
    config = replace(engine.config, kv_cache_dtype="int4")
    geometry = engine.model.geometry
    assert page_formats(config, replace(geometry, head_dim=80))["retrieval"].name == "int4"
    with pytest.raises(ConfigError, match=r"two elements in a byte, .* have 33") as caught:
        page_formats(config, replace(geometry, head_dim=33))
    assert caught.value.param == "kv_cache_dtype"


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_step_longer_than_the_context_can_be_measured(
    tiny_model: Callable[[str], Path], name: str
) -> None:
    model = build_engine(tiny_model(name)).model
    logits = run_without_cache(model, num_tokens=model.max_context + 3, num_rows=5)
    assert logits.shape == (5, model.vocab_size)
    assert logits.isfinite().all()
