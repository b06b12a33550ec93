"""Weights in fewer bits on a CUDA device: what they compute, what they take, what plans say."""

import gc
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from headlong.server.engine.engine_config import Quantization
from headlong.server.engine.weight_bytes import weights_bytes
from headlong.server.engine.weight_quantisation import (
    Processor,
    quantise_shapes,
    quantise_weights,
)
from headlong.server.engine.weights import load_weights, make_model
from support.engines import build_engine, greedy, random_prompts, run
from support.tiny_models import save_byte_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

QUANTIZATIONS: tuple[Quantization, ...] = ("int8wo", "int4wo", "fp8")
# Of the logits' norm, against the weights before: bits of a code, and of activations with fp8.
TOLERANCE = {"int8wo": 0.05, "fp8": 0.25, "int4wo": 0.5}
CONFIG = LlamaConfig(
    vocab_size=320, hidden_size=512, intermediate_size=1408, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for tensor cores, and not a multiple of 1024, so that tiles are padded."""
    target = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(target)
    save_byte_tokenizer(target)
    return target


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_an_engine_serves(folder: Path, quantization: Quantization, enforce_eager: bool) -> None:
    engine = build_engine(
        folder, device="cuda", dtype="bfloat16", quantization=quantization,
        enforce_eager=enforce_eager,
    )  # fmt: skip
    prompts = random_prompts([3, 40, 300], 320)
    tokens = run(engine, prompts, greedy(16))
    assert [len(each) for each in tokens] == [16] * 3
    assert run(engine, prompts, greedy(16)) == tokens


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_logits_are_near_those_of_the_weights_before(
    folder: Path, quantization: Quantization
) -> None:
    device = torch.device("cuda")
    config = build_engine(folder, device="cuda", dtype="bfloat16").config
    module = load_weights(config, device)
    tokens = torch.tensor(random_prompts([200], 320), device=device)
    with torch.inference_mode():
        before = module(tokens).logits.float()
        quantise_weights(module, quantization, device)
        after = module(tokens).logits.float()
    assert (after - before).norm() <= TOLERANCE[quantization] * before.norm()
    assert not torch.equal(after, before)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_plan_has_the_bytes_of_the_real_weights(folder: Path, quantization: Quantization) -> None:
    device = torch.device("cuda")
    config = build_engine(folder, device="cuda", dtype="bfloat16").config
    shapes = make_model(CONFIG, config, torch.device("meta"))
    quantise_shapes(shapes, quantization, Processor.of(device))
    real = load_weights(config, device)
    quantise_weights(real, quantization, device)
    assert weights_bytes(shapes) == weights_bytes(real)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_device_never_holds_the_whole_model(quantization: Quantization) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16) for _ in range(16)
            )

        def get_output_embeddings(self) -> None:
            return None

    model = Stack().requires_grad_(False)
    in_full = weights_bytes(model)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quantise_weights(model, quantization, torch.device("cuda"))
    # Two copies of one of sixteen layers in float32, beside what is smaller by then.
    assert torch.cuda.max_memory_allocated() - before < weights_bytes(model) + in_full // 3
