"""Weights in 8 and 4 bits: their values, their bytes, what serves with them, and what cannot."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from headlong.demo.paths import MODEL_DIR
from headlong.profiling.evaluation import needle_accuracy
from headlong.server.engine.engine import Engine
from headlong.server.engine.engine_config import EngineConfig, Quantization
from headlong.server.engine.model import load_model
from headlong.server.engine.weight_bytes import num_parameters, stored_tensors, weights_bytes
from headlong.server.engine.weight_quantisation import (
    Processor,
    describe_quantisation,
    quantise_shapes,
    quantise_weights,
)
from headlong.server.engine.weights import load_weights, make_model, weights_digest, weights_dtype
from headlong.server.errors import ConfigError
from support.engines import build_engine, greedy, random_profile, random_prompts, run
from support.tiny_models import CONFIGS, VOCAB_SIZE, save_byte_tokenizer

CPU = torch.device("cpu")
QUANTIZATIONS: tuple[Quantization, ...] = ("int8wo", "int4wo", "fp8")
SERVED = [
    *((name, dtype) for name in ("int8wo", "fp8") for dtype in ("float32", "bfloat16", "float16")),
    ("int4wo", "bfloat16"),
]
"""Quantizations and the dtypes that they compute in."""
# Of the largest result: codes are exact, products are rounded as in the dtype.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
H100 = Processor("cuda", (9, 0))
A100 = Processor("cuda", (8, 0))


def turned_back(layer: nn.Linear) -> torch.Tensor:
    """float32 [out_features, in_features], the weights that a layer's codes stand for."""
    weight = layer.weight
    parts = [*stored_tensors(weight)]
    if parts[0].dtype in (torch.int8, torch.float8_e4m3fn):
        return parts[0].float() * parts[1]
    # Codes of 4 bits lie as the kernel wants them: each column is its product with a unit vector.
    units = torch.eye(layer.in_features, dtype=weight.dtype)
    with torch.inference_mode():
        return nn.functional.linear(units, weight).T.float()


def steps(weight: torch.Tensor, quantization: str, group_size: int) -> torch.Tensor:
    """What two neighbouring codes of each weight differ by: [out_features, in_features]."""
    x = weight.float()
    if quantization == "int8wo":
        return (x.abs().amax(dim=1, keepdim=True) / 127.5).expand_as(x)
    if quantization == "fp8":
        # Three bits of mantissa, down to the smallest normal number.
        scale = x.abs().amax(dim=1, keepdim=True) / 448
        return scale * 2.0 ** ((x.abs() / scale).clamp(min=2**-6).log2().floor() - 3)
    groups = x.unflatten(1, (-1, group_size))
    span = groups.amax(dim=2, keepdim=True) - groups.amin(dim=2, keepdim=True)
    return (span / 15).expand_as(groups).flatten(1)


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and "lm_head" not in name
    }


def config_for(folder: Path, **changes: object) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cpu", **changes)  # type: ignore[arg-type]


def logits_of(module: nn.Module) -> torch.Tensor:
    tokens = torch.tensor(random_prompts([80], 300, seed=3))
    with torch.inference_mode():
        made: torch.Tensor = module(tokens).logits[0].float()
    return made


@pytest.mark.parametrize(("quantization", "dtype"), SERVED)
def test_a_layer_multiplies_with_the_nearest_codes(quantization: Quantization, dtype: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(192, 48, dtype=getattr(torch, dtype)).requires_grad_(False)
    weight, bias = layer.weight.clone(), layer.bias
    model = Bare(layer)
    quantise_weights(model, quantization, CPU)
    made = turned_back(layer)
    # Half a step; the rest is what the arithmetic of the dtype adds, with 4 bits a zero point too.
    allowed = 0.5 + {"float32": 0.01, "bfloat16": 0.55, "float16": 0.06}[dtype]
    assert ((made - weight.float()).abs() <= allowed * steps(weight, quantization, 64)).all()
    x = torch.randn(2, 7, 192, dtype=layer.weight.dtype)
    with torch.inference_mode():
        got = layer(x).float()
    expected = nn.functional.linear(x.float(), made, bias.float())
    assert got.shape == (2, 7, 48)
    assert (got - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize(
    ("quantization", "dtype"), [("int8wo", "float32"), ("fp8", "float32"), ("int4wo", "bfloat16")]
)
@pytest.mark.parametrize("name", ["qwen2", "embedded"])
def test_a_model_computes_with_its_weights_turned_back(
    tiny_model: Callable[[str], Path], name: str, quantization: Quantization, dtype: str
) -> None:
    """qwen2 has biases; the embedded model ties its output layer to its embeddings."""
    folder = tiny_model(name)
    plain = load_weights(config_for(folder, dtype=dtype), CPU)
    module = load_weights(config_for(folder, dtype=dtype, quantization=quantization), CPU)
    before, got = logits_of(plain), logits_of(module)
    small = linear_layers(module)
    for path, layer in linear_layers(plain).items():
        weight = turned_back(small[path]).to(layer.weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    expected = logits_of(plain)
    error = (got - expected).norm() / expected.norm()
    assert error <= {"float32": 1e-5, "bfloat16": 5e-2}[dtype]
    # That tells quantised weights from those of the checkpoint.
    assert (before - expected).norm() / expected.norm() > 3 * max(error, 1e-3)


@pytest.mark.parametrize(("quantization", "dtype"), SERVED)
def test_bytes_shrink_to_codes_and_scales(quantization: Quantization, dtype: str) -> None:
    plain = load_weights(config_for(MODEL_DIR, dtype=dtype), CPU)
    layers = linear_layers(plain).values()
    elements = sum(layer.weight.numel() for layer in layers)
    rows = sum(layer.out_features for layer in layers)
    others = weights_bytes(plain) - sum(layer.weight.nbytes for layer in layers)
    expected = {
        "int8wo": elements + rows * (4 + 1),
        "fp8": elements + rows * 4,
        "int4wo": elements // 2 + elements // 64 * 2 * 2,
    }
    module = load_weights(config_for(MODEL_DIR, dtype=dtype, quantization=quantization), CPU)
    assert weights_bytes(module) == others + expected[quantization]
    assert num_parameters(module) == num_parameters(plain)
    assert weights_dtype(module) == getattr(torch, dtype)
    assert weights_digest(module) != weights_digest(plain)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert type(module.lm_head.weight) is nn.Parameter


def test_an_output_layer_of_its_own_stays_as_it_is(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("llama")
    plain = load_weights(config_for(folder), CPU)
    module = load_weights(config_for(folder, quantization="int8wo"), CPU)
    assert torch.equal(module.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(module.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert all(len([*stored_tensors(each.weight)]) > 1 for each in linear_layers(module).values())


@pytest.mark.parametrize("quantization", ["int8wo", "fp8"])
def test_greedy_tokens_depend_on_no_chunk_and_no_batch(
    tiny_model: Callable[[str], Path], tmp_path: Path, quantization: Quantization
) -> None:
    folder = tiny_model("llama")
    profile = str(random_profile(folder, tmp_path / "p.json", seed=1))
    prompts = random_prompts([5, 90, 33], VOCAB_SIZE)
    whole = build_engine(folder, quantization=quantization, profile=profile)
    together = run(whole, prompts)
    small = build_engine(
        folder, quantization=quantization, profile=profile, max_num_batched_tokens=16,
        block_size=8,
    )  # fmt: skip
    assert [run(small, [prompt])[0] for prompt in prompts] == together
    assert together != run(build_engine(folder, profile=profile), prompts)


@pytest.mark.parametrize(
    ("quantization", "dtype"), [("int8wo", "float32"), ("fp8", "float32"), ("int4wo", "bfloat16")]
)
def test_facts_are_still_found(quantization: Quantization, dtype: str) -> None:
    engine = build_engine(
        MODEL_DIR, quantization=quantization, dtype=dtype, profile=str(MODEL_DIR / "profile.json"),
        kv_cache_memory_bytes=64 << 20, max_num_batched_tokens=2048,
    )  # fmt: skip

    def generate(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        return engine.tokenizer.batch_decode(run(engine, prompts, greedy(max_new_tokens)))

    assert needle_accuracy(generate, engine.tokenizer, 512, 10, seed=5).accuracy >= 0.9


@pytest.mark.parametrize(("quantization", "dtype"), SERVED)
def test_dummy_weights_are_quantised_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, quantization: Quantization, dtype: str
) -> None:
    caplog.set_level("INFO", "headlong")
    CONFIGS["qwen3"].save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    engine = build_engine(tmp_path, load_format="dummy", quantization=quantization, dtype=dtype)
    assert f"quantization {quantization}: weights of linear layers in " in caplog.text
    plain = load_model(config_for(tmp_path, load_format="dummy", dtype=dtype))
    assert engine.model.geometry == plain.geometry
    assert weights_bytes(engine.model.module) < weights_bytes(plain.module)
    assert len(run(engine, random_prompts([20], VOCAB_SIZE))[0]) == 12


@pytest.mark.parametrize("quantization", ["int8wo", "fp8"])
def test_shapes_without_memory_are_those_of_a_real_model(quantization: str) -> None:
    settings = LlamaConfig(**CONFIGS["llama"].to_dict() | {"num_hidden_layers": 1})
    config = EngineConfig(model="unused", dtype="bfloat16")
    shapes = make_model(settings, config, torch.device("meta"))
    quantise_shapes(shapes, quantization, A100)
    real = make_model(settings, config, CPU).requires_grad_(False)
    quantise_weights(real, quantization, CPU)
    pairs = [*zip(shapes.parameters(), real.parameters(), strict=True)]
    for shape, parameter in pairs:
        assert type(shape) is type(parameter)
        for part, whole in zip(stored_tensors(shape), stored_tensors(parameter), strict=True):
            assert part.device.type == "meta"
            assert (part.shape, part.dtype) == (whole.shape, whole.dtype)
    assert weights_bytes(shapes) == weights_bytes(real)
    assert len({type(shape) for shape, _ in pairs}) == 2


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (20, 96), (64, 1024), (48, 14336)])
def test_tiles_of_a_gpu_are_those_that_pytorch_packs(rows: int, columns: int) -> None:
    with torch.device("meta"):
        layer = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    model = Bare(layer)
    quantise_shapes(model, "int4wo", A100)
    codes, scales = stored_tensors(model.layer.weight)
    # torchao pads to 8 rows and 1024 columns, and packs two codes in a byte.
    padded = (-(-rows // 8) * 8, -(-columns // 1024) * 512)
    packed = torch.empty(padded, dtype=torch.uint8, device="meta")
    expected = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
    assert (codes.shape, codes.dtype) == (expected.shape, expected.dtype)
    group_size = next(size for size in (128, 64, 32) if columns % size == 0)
    assert scales.shape == (2 * padded[1] // group_size, padded[0], 2)
    assert scales.dtype == torch.bfloat16
    assert model.layer.weight.shape == (rows, columns)


class Bare(nn.Module):
    """As little of a transformers model as is looked at."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def get_output_embeddings(self) -> None:
        return None


def bare(columns: int, rows: int, dtype: torch.dtype = torch.bfloat16) -> Bare:
    with torch.device("meta"):
        return Bare(nn.Linear(columns, rows, dtype=dtype))


@pytest.mark.parametrize(
    ("model", "quantization", "processor", "message", "param"),
    [
        (bare(48, 32), "int4wo", A100, "multiple of 32 inputs, and layer has 48", "quantization"),
        (bare(64, 24), "int4wo", Processor("cpu"), "16 outputs, and layer has 24", "quantization"),
        (bare(64, 32, torch.float16), "int4wo", A100, "in bfloat16, .* float16", "dtype"),
        (bare(64, 32, torch.float32), "int4wo", Processor("cpu"), "in bfloat16", "dtype"),
        (bare(64, 24), "fp8", H100, "16 inputs and outputs, and .* 64 and 24", "quantization"),
        (Bare(nn.Embedding(4, 4)), "int8wo", A100, "Bare has none", "quantization"),
    ],
)
def test_what_cannot_be_quantised_is_named(
    model: Bare, quantization: str, processor: Processor, message: str, param: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        quantise_shapes(model, quantization, processor)
    assert caught.value.param == param


def test_what_is_expanded_takes_any_dtype_and_any_shape() -> None:
    quantise_shapes(bare(48, 24), "fp8", A100)
    quantise_shapes(bare(48, 24, torch.float16), "fp8", H100)
    quantise_shapes(bare(48, 24, torch.float32), "int8wo", H100)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_experts_are_refused(tiny_model: Callable[[str], Path], quantization: Quantization) -> None:
    with pytest.raises(ConfigError, match=r"mlp\.experts\.\S+ is none: .*experts") as caught:
        Engine(config_for(tiny_model("gpt_oss"), quantization=quantization, dtype="bfloat16"))
    assert caught.value.param == "quantization"


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_checkpoint_that_is_quantised_already_is_refused(
    tmp_path: Path, load_format: str
) -> None:
    config = LlamaConfig(**CONFIGS["llama"].to_dict())
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="quantised") as caught:
        load_model(config_for(tmp_path, quantization="int8wo", load_format=load_format))
    assert caught.value.param in ("quantization", "load_format")


def test_without_torchao_one_line_says_what_to_install(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"needs torchao: pip install 'headlong\[quantization\]'"):
        load_model(config_for(tiny_model("llama"), quantization="int8wo"))
    load_model(config_for(tiny_model("llama")))


@pytest.mark.parametrize(
    ("quantization", "processor", "dtype", "told"),
    [
        ("int8wo", H100, torch.bfloat16, "weights .* in 8 bits, computed in bfloat16"),
        ("int4wo", H100, torch.bfloat16, "weights .* in 4 bits, computed in bfloat16"),
        ("fp8", H100, torch.bfloat16, "weights and activations of linear layers in float8"),
        ("fp8", Processor("cuda", (8, 9)), torch.bfloat16, "weights and activations .*"),
        ("fp8", H100, torch.float16, "weights of linear layers in 8 bits, computed in float16"),
        ("fp8", A100, torch.bfloat16, "weights of linear layers in 8 bits, computed in bfloat16"),
        ("fp8", Processor("cpu"), torch.float32, "weights .* in 8 bits, computed in float32"),
    ],
)  # fmt: skip
def test_what_is_computed_in_which_format_is_told(
    quantization: str, processor: Processor, dtype: torch.dtype, told: str
) -> None:
    assert Processor.of(CPU) == Processor("cpu")

    assert re.fullmatch(told, describe_quantisation(quantization, processor, dtype))
