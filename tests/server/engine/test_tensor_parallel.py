"""A model's heads in another order, and which models are cut among ranks. No processes here."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Olmo2Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from headlong.server.engine import ranks
from headlong.server.engine.device import choose_device
from headlong.server.engine.engine import Engine
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.model import load_model
from headlong.server.engine.ranks import Ranks
from headlong.server.engine.tensor_parallel import check_divisible, check_num_ranks, order_heads
from headlong.server.errors import ConfigError
from support.tiny_models import CONFIGS, VOCAB_SIZE

ORDERS = ((1, 0), (0, 1), (1, 0))


def make(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        # Norms of ones and biases of zeros would look the same in any order.
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def check(model: PreTrainedModel, num_ranks: int = 2) -> None:
    config = model.config
    check_divisible(
        model, config.num_attention_heads, config.num_key_value_heads, config.head_dim, num_ranks
    )


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    tokens = torch.arange(3, 60)[None]
    found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"])
def test_heads_in_another_order_compute_the_same(name: str) -> None:
    model = make(CONFIGS[name])
    check(model)
    before, keys = logits(model), model.model.layers[0].self_attn.k_proj.weight.clone()
    order_heads(model, ORDERS, 4)
    assert not torch.equal(model.model.layers[0].self_attn.k_proj.weight, keys)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=0)


def test_an_order_for_one_layer_alone_is_felt() -> None:
    """The comparison above can fail: k moves without its queries."""
    model = make(CONFIGS["llama"])
    before = logits(model)
    layer = model.model.layers[0].self_attn
    layer.k_proj.weight.data = layer.k_proj.weight.data.roll(16, 0)
    assert (logits(model) - before).abs().max() > 1e-2


def test_experts_can_be_cut() -> None:
    config = Qwen3MoeConfig(
        **{**CONFIGS["qwen3"].to_dict(), "model_type": "qwen3_moe"},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    check(make(config))


@pytest.mark.parametrize(
    ("config", "num_ranks", "reason"),
    [
        (CONFIGS["llama"], 4, "is 4, which does not divide the model's 2 KV heads"),
        (CONFIGS["phi3"], 2, "layers of Phi3ForCausalLM have no q_proj, k_proj, v_proj and o_proj"),
        (CONFIGS["gpt_oss"], 2, "no tensor parallel plan that cuts the attention of GptOss"),
        (
            Olmo2Config(**{**CONFIGS["qwen2"].to_dict(), "model_type": "olmo2"}),
            2,
            "no tensor parallel plan that cuts the attention of Olmo2",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(
    config: PretrainedConfig, num_ranks: int, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        check(make(config), num_ranks)
    assert caught.value.param == "tensor_parallel_size"


def test_too_many_ranks_are_refused_before_any_starts(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "FollowerLink", None)
    with pytest.raises(ConfigError, match="is 3, which does not divide the model's 2 KV heads"):
        Ranks(EngineConfig(model=str(tiny_model("llama")), device="cpu", tensor_parallel_size=3))


def test_what_a_configuration_does_not_say_is_left_to_the_load(tmp_path: Path) -> None:
    check_num_ranks(EngineConfig(model=str(tmp_path / "missing"), tensor_parallel_size=3))


def test_a_quantised_checkpoint_is_refused() -> None:
    model = make(LlamaConfig(**CONFIGS["llama"].to_dict()))
    model.config.quantization_config = {"quant_method": "mxfp4"}
    with pytest.raises(ConfigError, match="quantised"):
        check(model)


def test_a_weight_of_all_heads_is_refused() -> None:
    model = make(CONFIGS["llama"])
    layer = model.model.layers[1].self_attn
    layer.register_parameter("mixed", torch.nn.Parameter(torch.ones(VOCAB_SIZE)))
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.mixed is of all heads at once"):
        check(model)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 65}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 2, "device": "cuda:1"}, "device"),
    ],
)
def test_the_setting_is_checked(changes: dict[str, object], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model="m", **changes)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_every_rank_has_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    two = EngineConfig(model="m", tensor_parallel_size=2)
    assert [str(choose_device(two, rank)) for rank in range(2)] == ["cuda:0", "cuda:1"]
    with pytest.raises(ConfigError, match="is 3, but there are 2 CUDA devices") as caught:
        choose_device(EngineConfig(model="m", tensor_parallel_size=3))
    assert caught.value.param == "tensor_parallel_size"


def test_a_model_on_one_device_is_not_for_several_ranks(tiny_model: Callable[[str], Path]) -> None:
    config = EngineConfig(model=str(tiny_model("llama")), device="cpu", tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="is for serving") as caught:
        load_model(config)
    assert caught.value.param == "tensor_parallel_size"
    whole = load_model(EngineConfig(model=config.model, device="cpu"))
    with pytest.raises(ConfigError, match="a model that is loaded already"):
        Engine(config, whole)
