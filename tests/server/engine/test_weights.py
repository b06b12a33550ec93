"""Weights that are read, weights that are made, and in which dtype."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from headlong.server.engine.engine import Engine
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.model import load_model
from headlong.server.engine.weights import load_weights, weights_dtype
from headlong.server.errors import ConfigError
from support.engines import build_engine, run
from support.tiny_models import CONFIGS, save_byte_tokenizer

PROMPT = [10, 20, 30, 40]


@pytest.fixture
def shape_only(tmp_path: Path) -> Callable[..., Path]:
    """A folder with a configuration and a tokenizer, and no weights."""

    def folder(name: str = "qwen3", **changes: object) -> Path:
        target = tmp_path / name
        config = type(CONFIGS[name])(**(CONFIGS[name].to_dict() | changes))
        config.save_pretrained(target)
        save_byte_tokenizer(target)
        return target

    return folder


def dummy(folder: Path, **changes: object) -> EngineConfig:
    settings = {"device": "cpu", "load_format": "dummy"} | changes
    return EngineConfig(model=str(folder), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_dummy_weights_are_finite_and_small(shape_only: Callable[..., Path], name: str) -> None:
    folder = shape_only(name, initializer_range=0.02)
    module = load_weights(dummy(folder), torch.device("cpu"))
    for parameter in module.parameters():
        assert parameter.isfinite().all()
        # Norms scale by 1; everything else is drawn.
        assert parameter.abs().max() <= 1.0


def test_dummy_weights_serve(shape_only: Callable[..., Path]) -> None:
    folder = shape_only()
    engine = build_engine(folder, load_format="dummy", seed=3)
    tokens = run(engine, [PROMPT])
    assert run(build_engine(folder, load_format="dummy", seed=3), [PROMPT]) == tokens
    assert run(build_engine(folder, load_format="dummy", seed=4), [PROMPT]) != tokens


def test_dummy_weights_leave_the_random_numbers_of_others_alone(
    shape_only: Callable[..., Path],
) -> None:
    before = torch.get_rng_state()
    load_model(dummy(shape_only()))
    assert torch.equal(torch.get_rng_state(), before)


def test_dummy_weights_take_the_dtype(shape_only: Callable[..., Path]) -> None:
    folder = shape_only(dtype="bfloat16")
    for dtype, expected in (("auto", torch.float32), ("float16", torch.float16)):
        model = load_model(dummy(folder, dtype=dtype))
        assert (model.dtype, model.geometry.kv_dtype) == (expected, expected)
        assert {each.dtype for each in model.module.parameters()} == {expected}


def test_without_dummy_the_weights_are_missed(shape_only: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="cannot load model"):
        Engine(dummy(shape_only(), load_format="auto"))


def test_a_quantised_checkpoint_has_no_dummy(shape_only: Callable[..., Path]) -> None:
    folder = shape_only(quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(ConfigError, match="quantised") as caught:
        load_model(dummy(folder))
    assert caught.value.param == "load_format"


def test_auto_on_a_cpu_is_float32(tiny_model: Callable[[str], Path]) -> None:
    model = load_model(EngineConfig(model=str(tiny_model("qwen3")), device="cpu"))
    assert (model.dtype, model.geometry.kv_dtype) == (torch.float32, torch.float32)


def test_most_elements_name_the_dtype() -> None:
    module = nn.Sequential(nn.Linear(64, 64).bfloat16(), nn.Linear(4, 4))
    module.register_parameter("ids", nn.Parameter(torch.zeros(9999).int(), requires_grad=False))
    assert weights_dtype(module) == torch.bfloat16


def test_the_cache_takes_the_dtype_of_the_keys(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of the weights, here the experts', may be of another dtype than attention's."""
    monkeypatch.setattr("headlong.server.engine.model.weights_dtype", lambda module: torch.bfloat16)
    engine = build_engine(tiny_model("qwen3"))
    assert engine.model.dtype == torch.bfloat16
    assert engine.plan.shape.dtype == torch.float32


def test_keys_of_a_dtype_without_a_cache_are_refused(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def widened(config: EngineConfig, device: torch.device, place: torch.device) -> object:
        return load_weights(config, device, place).double()

    monkeypatch.setattr("headlong.server.engine.model.load_weights", widened)
    with pytest.raises(ConfigError, match="float64 is not supported") as caught:
        build_engine(tiny_model("qwen3"))
    assert caught.value.param == "dtype"
