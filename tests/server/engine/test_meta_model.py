"""Models without weights: every architecture, and every configuration that says too little."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headlong.server.engine.engine_config import DType, EngineConfig
from headlong.server.engine.meta_model import meta_model
from headlong.server.engine.weight_bytes import num_parameters
from headlong.server.errors import ConfigError
from support.engines import build_engine
from support.llama3 import LLAMA3_8B, write_config
from support.tiny_models import CONFIGS


def read(path: Path | str, dtype: DType = "bfloat16") -> object:
    return meta_model(EngineConfig(model=str(path), dtype=dtype))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_probe_sees_what_it_sees_of_the_weights(
    tiny_model: Callable[[str], Path], name: str
) -> None:
    folder = tiny_model(name)
    loaded = build_engine(folder).model
    made = meta_model(EngineConfig(model=str(folder), dtype="float32"))
    assert made.geometry == loaded.geometry
    assert made.max_context == loaded.max_context
    assert made.dtype == loaded.dtype
    assert made.vocab_size == loaded.vocab_size
    shapes = [{n: (p.shape, p.dtype) for n, p in each.module.named_parameters()}
              for each in (made, loaded)]  # fmt: skip
    assert shapes[0] == shapes[1]


def test_tied_weights_count_once(tmp_path: Path) -> None:
    apart = meta_model(EngineConfig(model=str(write_config(tmp_path))))
    tied = meta_model(EngineConfig(model=str(write_config(tmp_path, tie_word_embeddings=True))))
    assert num_parameters(apart.module) - num_parameters(tied.module) == 128256 * 4096


def test_the_checkpoints_own_dtype(tmp_path: Path) -> None:
    path = write_config(tmp_path, torch_dtype="float16")
    assert meta_model(EngineConfig(model=str(path))).dtype is torch.float16
    path = write_config(tmp_path, torch_dtype=None)
    with pytest.raises(ConfigError, match="names no dtype: choose one") as caught:
        read(path, "auto")
    assert caught.value.param == "dtype"


def test_a_folder_a_file_of_any_name_and_a_text_model_inside(tmp_path: Path) -> None:
    text = {name: LLAMA3_8B[name] for name in ("model_type", "hidden_size", "num_hidden_layers")}
    inner = text | {"model_type": "gemma3_text", "num_hidden_layers": 2}
    whole = {"model_type": "gemma3", "text_config": inner, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    for path in (tmp_path, tmp_path / "config.json"):
        model = meta_model(EngineConfig(model=str(path), dtype="bfloat16"))
        assert model.geometry.num_layers == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "names no model_type"),
        ({"model_type": 3}, "names no model_type"),
        ({"model_type": "nope"}, "knows no model_type 'nope'"),
        ({"model_type": "clip"}, "no causal language model|says nothing of"),
        ({"hidden_size": None}, "says nothing of hidden_size"),
        ({"num_hidden_layers": None, "vocab_size": None},
         "says nothing of num_hidden_layers, vocab_size"),
        ({"num_attention_heads": None}, "says nothing of num_attention_heads"),
        ({"intermediate_size": None}, "says nothing of intermediate_size"),
        ({"max_position_embeddings": None}, "says nothing of max_position_embeddings"),
        ({"hidden_size": "wide"}, "hidden_size.*expected int, got str"),
        ({"hidden_size": 4097}, "not a multiple"),
        ({"model_type": "mistral", "num_key_value_heads": None},
         "says nothing of num_key_value_heads"),
        ({"model_type": "qwen3"}, "says nothing of head_dim"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be in 1 to 4096, got -1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be in 1 to 4096, got 0"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be .* got 1000000000000"),
        ({"num_attention_heads": 0}, "num_attention_heads must be in 1 to"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be in 1 to"),
        ({"num_key_value_heads": 10**12}, "num_key_value_heads must be in 1 to"),
        ({"head_dim": -1}, "head_dim must be in 1 to"),
        ({"max_position_embeddings": 10**4000}, "max_position_embeddings must be .* got 10{19}$"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"quantised checkpoint \(mxfp4\)"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic RoPE"),
        ({"layer_types": ["linear_attention"] * 32}, "linear_attention are not supported"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_planned(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(write_config(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_heads_that_the_architecture_derives_may_be_left_out(tmp_path: Path) -> None:
    path = write_config(tmp_path, num_key_value_heads=None, num_hidden_layers=1)
    geometry = meta_model(EngineConfig(model=str(path))).geometry
    assert (geometry.num_kv_heads, geometry.head_dim) == (32, 128)


@pytest.mark.parametrize(
    ("size", "value"), [("num_hidden_layers", 10**12), ("hidden_size", 0), ("head_dim", -1)]
)
def test_sizes_of_a_text_model_inside(tmp_path: Path, size: str, value: int) -> None:
    inner = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 2, size: value}
    whole = {"model_type": "gemma3", "text_config": inner, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{size} must be in 1 to"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is not JSON"), ("{", "is not JSON"), ("[1]", "not a JSON object"),
     ('{"model_type": "llama", "model_type": "qwen3"}', "twice")],
)  # fmt: skip
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    for model in (path, tmp_path):
        with pytest.raises(ValueError, match=message):
            read(model)


@pytest.mark.parametrize("name", ["none.json", "./here", "a/b/c", "/nowhere", "no such", "~/m"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: no such file"):
        read(name)


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        read(tmp_path)
