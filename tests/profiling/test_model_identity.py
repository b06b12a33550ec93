from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from transformers import (
    AutoConfig,
    Gemma3Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)

from headlong.profiling.errors import UnsupportedModelError
from headlong.profiling.model_identity import ModelIdentity


def test_reads_the_numbers() -> None:
    config = Qwen3Config(num_hidden_layers=28, num_key_value_heads=8, head_dim=64)
    identity = ModelIdentity.from_config(config)
    assert identity.architecture == "qwen3"
    assert (identity.num_layers, identity.num_kv_heads, identity.head_dim) == (28, 8, 64)
    assert len(identity.fingerprint) == 16


def test_head_dim_falls_back_to_hidden_size() -> None:
    config = LlamaConfig(hidden_size=96, num_attention_heads=6)
    config.head_dim = None
    assert ModelIdentity.from_config(config).head_dim == 16


def test_kv_heads_fall_back_to_query_heads() -> None:
    identity = ModelIdentity.from_config(GPT2Config(n_layer=3, n_head=4, n_embd=64))
    assert (identity.num_layers, identity.num_kv_heads, identity.head_dim) == (3, 4, 16)


def test_a_composite_config_is_its_text_model() -> None:
    config = Gemma3Config()
    assert ModelIdentity.from_config(config) == ModelIdentity.from_config(config.text_config)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config, MistralConfig, GptOssConfig])
def test_survives_saving(kind: type, tmp_path: Path) -> None:
    config = kind()
    before = ModelIdentity.from_config(config)
    config.save_pretrained(tmp_path)
    assert ModelIdentity.from_config(AutoConfig.from_pretrained(tmp_path)) == before


def test_a_loaded_model_has_the_identity_of_its_config(
    any_model: PreTrainedModel, tmp_path: Path
) -> None:
    any_model.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert ModelIdentity.from_config(any_model.config) == ModelIdentity.from_config(loaded)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 3},
        {"num_attention_heads": 16},
        {"num_key_value_heads": 4},
        {"head_dim": 32},
        {"hidden_size": 64},
        {"vocab_size": 77},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
    ],
)
def test_the_fingerprint_covers(changes: dict[str, object]) -> None:
    original = ModelIdentity.from_config(Qwen3Config())
    assert ModelIdentity.from_config(Qwen3Config(**changes)).fingerprint != original.fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"name_or_path": "/elsewhere"},
        {"transformers_version": "4.0"},
        {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}},
    ],
)
def test_the_fingerprint_leaves_out(changes: dict[str, object]) -> None:
    config = Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    other = Qwen3Config(**({"rope_parameters": config.rope_parameters} | changes))
    assert ModelIdentity.from_config(other) == ModelIdentity.from_config(config)


def test_the_fingerprint_is_stable() -> None:
    assert ModelIdentity.from_config(Qwen3Config()).fingerprint == "b3267c3002eb4bb8"


def test_refuses_a_config_without_layers() -> None:
    class Odd(SimpleNamespace):
        model_type = "odd"
        num_hidden_layers = None

        def get_text_config(self) -> "Odd":
            return self

    with pytest.raises(UnsupportedModelError, match="'odd' config has no usable num_hidden_layers"):
        ModelIdentity.from_config(Odd())


@pytest.mark.parametrize(
    "values",
    [
        {"num_layers": 0, "num_kv_heads": 1},
        {"num_layers": 1, "num_kv_heads": 0},
        {"num_layers": 1, "num_kv_heads": 1, "head_dim": -1},
        {"num_layers": 1, "num_kv_heads": 1, "fingerprint": "xyz"},
        {"num_layers": True, "num_kv_heads": 1},
        {"num_layers": 1, "num_kv_heads": 1, "depth": 3},
    ],
)
def test_refuses(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ModelIdentity.model_validate(values)
