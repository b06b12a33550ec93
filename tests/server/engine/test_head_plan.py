"""What cannot be compensated for is refused where it is asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest

from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.gpus import find_gpu
from headlong.server.engine.sizing import EvenHeads, SizingRequest
from headlong.server.errors import ConfigError
from support.engines import build_engine, random_profile


def test_compensation_needs_a_profile(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="compensation needs a profile") as caught:
        build_engine(tiny_model("llama"), compensation="on")
    assert caught.value.param == "compensation"


def test_a_format_is_of_heads_that_there_are(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    profile = random_profile(folder, tmp_path / "p.json", seed=1)
    for settings, message in (
        ({"kv_cache_dtype": "streaming=int8"}, "names streaming heads"),
        ({"kv_cache_dtype": "sliding=int8", "profile": str(profile)}, "names sliding heads"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            build_engine(folder, **settings)
        assert caught.value.param == "kv_cache_dtype"
    build_engine(folder, kv_cache_dtype="streaming=int8", profile=str(profile))


def test_compensation_needs_a_window(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    profile = random_profile(folder, tmp_path / "p.json", seed=1)
    with pytest.raises(ConfigError, match="window_size of at least 2") as caught:
        build_engine(folder, profile=str(profile), window_size=1, compensation="on")
    assert caught.value.param == "compensation"


def test_compensation_is_of_some_layer(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    profile = random_profile(folder, tmp_path / "p.json", seed=1)
    for layer, message in (
        (99, "must be below [0-9]+, the model's number of layers, got 99"),
        (-1, "0 or more"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            build_engine(
                folder, profile=str(profile), compensation="on", compensation_from_layer=layer
            )
        assert caught.value.param == "compensation_from_layer"
    with pytest.raises(ConfigError, match="left out without compensation"):
        EngineConfig(model="m", compensation_from_layer=0)


def test_a_plan_refuses_what_an_engine_does() -> None:
    config = EngineConfig(model="m", compensation="on")
    with pytest.raises(ConfigError, match="window_size of at least 2"):
        SizingRequest(config=config, gpu=find_gpu("h100-80g"), even=EvenHeads(0.5, window_size=1))
