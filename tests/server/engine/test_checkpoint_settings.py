"""What a checkpoint says beside its weights: how to sample, and code of its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from headlong.server.engine.engine_config import EngineConfig
from headlong.server.errors import ConfigError
from support.engines import build_engine


@pytest.fixture
def copy(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def edit(path: Path, changes: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DRAWN = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
}


@pytest.mark.parametrize(
    ("said", "defaults"),
    [
        (DRAWN, {name: value for name, value in DRAWN.items() if name != "do_sample"}),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.6}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
    ],
)
def test_sampling_defaults_are_the_checkpoints(
    copy: Path, said: dict[str, object], defaults: dict[str, float]
) -> None:
    edit(copy / "generation_config.json", said)
    engine = build_engine(copy)
    found = engine.model.default_sampling
    assert {name: found[name] for name in defaults} == defaults
    assert found == engine.info().default_sampling


def test_sampling_defaults_of_a_checkpoint_that_says_none(copy: Path) -> None:
    (copy / "generation_config.json").unlink()
    defaults = build_engine(copy).model.default_sampling
    assert "temperature" not in defaults
    assert "top_p" not in defaults


class PlantedError(Exception):
    """Stands for what transformers would do next."""


@pytest.mark.parametrize("trusted", [None, False, True])
@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoTokenizer])
def test_code_of_a_checkpoint_is_run_only_if_trusted(
    copy: Path, monkeypatch: pytest.MonkeyPatch, loader: Any, trusted: bool | None
) -> None:
    seen: list[object] = []

    def from_pretrained(*_: object, **options: object) -> None:
        seen.append(options["trust_remote_code"])
        raise PlantedError

    monkeypatch.setattr(loader, "from_pretrained", from_pretrained)
    with pytest.raises((ConfigError, PlantedError)):
        build_engine(copy, **({} if trusted is None else {"trust_remote_code": trusted}))
    assert seen == [bool(trusted)]


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_checkpoint_without_weights_is_run_only_if_trusted(
    copy: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    seen: list[object] = []
    read = AutoConfig.from_pretrained
    make = AutoModelForCausalLM.from_config

    def from_pretrained(*args: object, **options: Any) -> object:
        seen.append(options["trust_remote_code"])
        return read(*args, **options)

    def from_config(*args: object, **options: Any) -> object:
        seen.append(options["trust_remote_code"])
        return make(*args, **options)

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", from_config)
    build_engine(copy, load_format="dummy", trust_remote_code=trusted)
    assert len(seen) >= 2
    assert set(seen) == {trusted}


def test_code_of_a_checkpoint_is_not_trusted_unless_asked() -> None:
    assert EngineConfig(model="m").trust_remote_code is False
