"""A plan from a configuration alone, against what an engine with the weights really takes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from headlong.cache.reservation import Reservation
from headlong.server.engine import memory
from headlong.server.engine.engine import Engine
from headlong.server.engine.engine_config import EngineConfig, Quantization
from headlong.server.engine.gpus import Gpu, find_gpu
from headlong.server.engine.live_bytes import peak_bytes
from headlong.server.engine.memory import (
    DeviceMemory,
    plan_arena,
    run_largest_step,
    sampling_bytes,
)
from headlong.server.engine.meta_model import meta_model
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sizing import (
    CUDA_CONTEXT_BYTES,
    EvenHeads,
    Sizing,
    SizingRequest,
    _activations,
    size_model,
)
from headlong.server.engine.weight_bytes import stored_tensors
from headlong.server.errors import ConfigError
from support.engines import build_engine, greedy, random_profile, random_prompts
from support.llama3 import write_config
from support.tiny_models import CONFIGS

GIB = 1 << 30
ARENA = 16 << 20
WITHIN = 0.02


def size_like(engine: Engine, **changes: object) -> Sizing:
    """The plan for an engine, made from its checkpoint's configuration alone."""
    config = replace(engine.config, dtype="float32")
    return size_model(SizingRequest(config=config, **changes))  # type: ignore[arg-type]


def stored_bytes(module: nn.Module) -> int:
    """Of the memory that a model's weights really have."""
    storages = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for tensor in (*module.parameters(), *module.buffers())
        for part in stored_tensors(tensor)
    }
    return sum(storages.values())


def size_llama3(
    folder: Path, sparsity: float | None = None, *, num_layers: int = 32, **changes: object
) -> Sizing:
    """The plan for Llama-3-8B; fewer layers where its size is not what is tested."""
    engine = {name: changes.pop(name) for name in [*changes] if hasattr(EngineConfig, name)}
    even = None if sparsity is None else EvenHeads(sparsity)
    path = write_config(folder, num_hidden_layers=num_layers)
    settings: dict[str, object] = {"model": str(path), "dtype": "bfloat16"}
    return size_model(
        SizingRequest(
            config=EngineConfig(**(settings | engine)),  # type: ignore[arg-type]
            even=even,
            **({"gpu": find_gpu("a100-80g")} | changes),  # type: ignore[arg-type]
        )
    )


def largest_kv_bytes(engine: Engine, num_prompt: int, num_generated: int) -> int:
    (prompt,) = random_prompts([num_prompt], engine.model.vocab_size)
    engine.add_request(EngineRequest("0", prompt, greedy(num_generated)))
    peak = 0
    while engine.has_work:
        for output in engine.step():
            peak = max(peak, output.kv_bytes_peak)
    return peak


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("compressed", [False, True])
def test_an_engine_takes_what_was_planned(
    tiny_model: Callable[[str], Path], tmp_path: Path, name: str, compressed: bool
) -> None:
    folder = tiny_model(name)
    changes = {}
    if compressed:
        changes["profile"] = str(random_profile(folder, tmp_path / "p.json", seed=1))
    check_plan(build_engine(folder, kv_cache_memory_bytes=ARENA, **changes))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"quantization": "int8wo", "kv_cache_dtype": "int4"}),
        ("qwen2", {"quantization": "int8wo", "kv_cache_dtype": "int8"}),
        ("gemma3", {"quantization": "fp8", "kv_cache_dtype": "retrieval=fp8"}),
        ("phi3", {"quantization": "fp8", "compensation": "on", "retrieval_budget": 256}),
    ],
)
def test_a_compressed_engine_takes_what_was_planned(
    tiny_model: Callable[[str], Path], tmp_path: Path, name: str, settings: dict[str, str]
) -> None:
    folder = tiny_model(name)
    profile = random_profile(folder, tmp_path / "p.json", seed=1)
    check_plan(build_engine(folder, kv_cache_memory_bytes=ARENA, profile=str(profile), **settings))


def check_plan(engine: Engine) -> None:
    sizing = size_like(engine)
    module, config = engine.model.module, engine.config
    weights = stored_bytes(module)
    assert sizing.weights_bytes == pytest.approx(weights, rel=WITHIN)
    arena = engine.arena.memory.nbytes
    assert sizing.arena_bytes == pytest.approx(arena, rel=WITHIN)
    activations = peak_bytes(
        lambda: run_largest_step(engine.model, config.max_num_batched_tokens, config.max_num_seqs)
    )
    assert sizing.activation_bytes == pytest.approx(activations, rel=WITHIN)
    total = sizing.weights_bytes + sizing.arena_bytes + sizing.activation_bytes
    assert total == pytest.approx(weights + arena + activations, rel=WITHIN)

    shape = sizing.own.shape
    for num_prompt, num_generated in ((240, 16), (1200, 16)):
        planned = 0
        last = num_prompt + num_generated - 1
        ends = [*range(256, num_prompt, 256), *range(num_prompt, last + 1)]
        for start, end in pairwise([0, *ends]):
            blocks = shape.sequence_blocks(end, end - start)
            sizes = [
                count * shape.block_bytes(group)
                for count, group in zip(blocks, shape.groups, strict=True)
            ]
            planned = max(planned, sum(sizes))
        held = largest_kv_bytes(engine, num_prompt, num_generated)
        assert held == pytest.approx(planned, rel=WITHIN)


def test_an_engine_on_that_gpu_would_make_the_same_arena(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and activations are compared above; here, what is made of them."""
    folder = tiny_model("gemma3")
    profile = str(random_profile(folder, tmp_path / "p.json", seed=1))
    engine = build_engine(folder, profile=profile, max_model_len=256, kv_cache_memory_bytes=ARENA)
    module = engine.model.module
    config = replace(engine.config, kv_cache_memory_bytes=None, gpu_memory_utilization=1.0)
    step = partial(
        run_largest_step, engine.model, config.max_num_batched_tokens, config.max_num_seqs
    )
    measured = DeviceMemory(
        total_bytes=0,
        used_bytes=CUDA_CONTEXT_BYTES
        + sum(each.nbytes for each in (*module.parameters(), *module.buffers())),
        activation_bytes=peak_bytes(step),
        sampling_bytes=sampling_bytes(config.max_num_seqs, engine.model.vocab_size),
    )
    needed = measured.used_bytes + measured.activation_bytes + measured.sampling_bytes
    measured = replace(measured, total_bytes=needed + (1 << 19))
    gpu = Gpu("small", measured.total_bytes)
    sizing = size_model(SizingRequest(config=replace(config, dtype="float32"), gpu=gpu))
    monkeypatch.setattr(memory, "_measure", lambda config, model: measured)
    on_cuda = replace(engine.model, device=torch.device("cuda", 0))
    plan, _ = plan_arena(config, on_cuda, engine.groups)
    assert plan.arena_bytes < engine.arena.memory.nbytes, "memory must be the bound"
    assert sizing.arena_bytes == pytest.approx(plan.arena_bytes, rel=WITHIN)
    assert sizing.own.shape == plan.shape


def test_between_two_runs_the_step_takes_no_more_than_is_planned(
    tiny_model: Callable[[str], Path],
) -> None:
    config = EngineConfig(
        model=str(tiny_model("llama")), dtype="bfloat16", max_num_seqs=8,
        max_num_batched_tokens=1024,
    )  # fmt: skip
    model = meta_model(config)
    activation = _activations(model, config)
    taken = 0
    for num_seqs in (1, 8, 9, 100, 500, 767, 768, 1024):
        taken = peak_bytes(partial(run_largest_step, model, 1024, num_seqs))
        assert taken <= activation(num_seqs)
    assert activation(8) < activation(9) < activation(768) == activation(1024) == taken


def test_the_sequences_that_were_planned_are_admitted(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    profile = str(random_profile(folder, tmp_path / "p.json", seed=1))
    length = 400
    settings: dict[str, Any] = {"profile": profile, "kv_cache_memory_bytes": 1 << 20}
    sizing = size_like(build_engine(folder, **settings), lengths=(length,))
    most = sizing.own.sequences[length]
    assert most > sizing.full_cache.sequences[length] > 1
    engine = build_engine(folder, max_num_seqs=most, max_model_len=length, **settings)
    cache = engine.cache

    def begin() -> Reservation:
        sequence = cache.begin()
        cache.extend(sequence, 1)
        return Reservation(cache.policies(), length, sequence)

    held = [begin() for _ in range(most - 1)]
    assert cache.has_room(Reservation(cache.policies(), length), held)
    held.append(begin())
    assert not cache.has_room(Reservation(cache.policies(), length), held)


def test_llama_3_8b_on_an_a100(tmp_path: Path) -> None:
    """The plan by hand: 8.03 B parameters, 32 layers of 8 KV heads of 128 elements."""
    sizing = size_llama3(tmp_path, 0.5)
    assert sizing.num_parameters == 8_030_261_248
    assert sizing.weights_bytes == pytest.approx(2 * 8_030_261_248, rel=1e-6)
    own, full = sizing.own, sizing.full_cache
    assert full.shape.growing_token_bytes == 2 * 32 * 8 * 128 * 2 == 131_072
    assert full.shape.constant_sequence_bytes == 0
    assert own.shape.growing_token_bytes == 65_536
    # 128 sink tokens, and blocks that 254 earlier tokens can reach: 8 and 17 blocks of 16 tokens.
    assert own.shape.constant_sequence_bytes == (8 + 17) * 16 * 65_536
    assert sizing.no_profile is None
    assert sizing.memory is not None
    for cache in (own, full):
        longest = cache.max_context_tokens
        assert longest is not None
        taken = cache.shape.sequence_bytes(longest)
        assert 0.93 * sizing.cache_bytes < taken <= sizing.cache_bytes
    assert own.max_context_tokens == 895_664
    assert full.max_context_tokens == 448_032
    assert own.sequences == {8192: 103, 32768: 27, 131072: 6, 1 << 20: 0}
    assert full.sequences == {8192: 54, 32768: 13, 131072: 3, 1 << 20: 0}
    assert sizing.model.max_context == 8192


def test_llama_3_8b_beside_duo_attentions_3_3_million_tokens(tmp_path: Path) -> None:
    """DuoAttention (arXiv 2410.10819): 3.30 M tokens with 8-bit weights and a 4-bit KV cache."""
    sizing = size_llama3(
        tmp_path, 0.5, kv_cache_dtype="int4", quantization="int8wo", max_num_seqs=1
    )
    # 64 bytes of elements, a scale and a minimum, for K and for V.
    assert sizing.full_cache.shape.growing_token_bytes == 2 * 32 * 8 * (64 + 4)
    assert sizing.own.shape.growing_token_bytes == 32 * 8 * (64 + 4)
    linear = 32 * 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336)
    rows = 32 * (4096 + 1024 + 1024 + 4096 + 2 * 14336 + 4096)
    # A float32 scale and an int8 zero point for each row.
    assert sizing.weights_bytes == pytest.approx(
        linear + 5 * rows + 2 * (8_030_261_248 - linear), rel=1e-6
    )
    longest = sizing.own.max_context_tokens
    assert longest is not None
    assert longest > 3_300_000
    assert longest > 1.95 * (sizing.full_cache.max_context_tokens or 0)


@pytest.mark.parametrize(
    ("kv_cache_dtype", "token_bytes"),
    [("auto", 512), ("bfloat16", 512), ("fp8", 260), ("int8", 260), ("int4", 136)],
)
def test_bytes_of_a_token_by_format(tmp_path: Path, kv_cache_dtype: str, token_bytes: int) -> None:
    sizing = size_llama3(tmp_path, num_layers=2, kv_cache_dtype=kv_cache_dtype)
    assert sizing.own.shape.growing_token_bytes == 2 * 8 * token_bytes


def test_a_format_for_each_kind_of_head(tmp_path: Path) -> None:
    sizing = size_llama3(
        tmp_path, 0.5, num_layers=2, kv_cache_dtype="retrieval=int4,streaming=int8"
    )
    own = sizing.own.shape
    assert own.growing_token_bytes == 8 * 136
    assert own.constant_sequence_bytes == (8 + 17) * 16 * 8 * 260
    # A full cache keeps each head in the format that it has.
    assert sizing.full_cache.shape.growing_token_bytes == 8 * (136 + 260)


def test_bounds_and_sums_take_their_bytes(tmp_path: Path) -> None:
    plain, summed, bounded = (
        size_llama3(tmp_path, 0.5, num_layers=2, **settings)
        for settings in ({}, {"compensation": "on"}, {"retrieval_budget": 1024})
    )
    # Of a page of 16 tokens: float32 sums of K and V; four bounds of a key in bfloat16.
    steady = 8 + 17
    assert summed.own.shape.constant_sequence_bytes == 8 * steady * (16 * 512 + 2 * 128 * 4)
    assert summed.own.shape.growing_token_bytes == plain.own.shape.growing_token_bytes
    assert summed.full_cache.shape.growing_token_bytes == plain.full_cache.shape.growing_token_bytes
    assert bounded.own.shape.growing_token_bytes == 8 * (512 + 4 * 128 * 2 // 16)
    assert bounded.own.shape.constant_sequence_bytes == plain.own.shape.constant_sequence_bytes


def test_weights_by_quantisation(tmp_path: Path) -> None:
    def size(quantization: str | None, gpu: str = "h100-80g") -> Sizing:
        return size_llama3(tmp_path, num_layers=4, quantization=quantization, gpu=find_gpu(gpu))

    elements = 4 * 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336)
    rows = 4 * (4096 + 1024 + 1024 + 4096 + 2 * 14336 + 4096)
    plain = size(None)
    others = plain.weights_bytes - 2 * elements
    assert size("fp8").weights_bytes == others + elements + 4 * rows
    assert size("int8wo").weights_bytes == others + elements + 5 * rows
    # A scale and a zero point in bfloat16 for each 128 elements.
    assert size("int4wo").weights_bytes == others + elements // 2 + elements // 128 * 4


def test_what_a_step_takes_follows_how_weights_are_multiplied(tmp_path: Path) -> None:
    # A small vocabulary: else the logits of a step outweigh everything before them.
    path = write_config(tmp_path, num_hidden_layers=1, vocab_size=512)

    def activations(quantization: Quantization | None, gpu: str = "h100-80g") -> int:
        config = EngineConfig(model=str(path), quantization=quantization)
        return size_model(SizingRequest(config=config, gpu=find_gpu(gpu))).activation_bytes

    largest = 14336 * 4096 * 2
    plain = activations(None)
    # A matrix is expanded before it is multiplied.
    assert plain < activations("int8wo") <= plain + largest
    # Tensor cores read 4 bits as they are.
    assert activations("int4wo") == pytest.approx(plain, rel=WITHIN)
    # Where float8 is not multiplied, matrices are expanded by way of float32.
    assert plain < activations("fp8") < activations("fp8", "a100-80g")


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 1.0])
def test_streaming_heads_are_dealt_evenly(tmp_path: Path, sparsity: float) -> None:
    groups = size_llama3(tmp_path, sparsity).own.shape.groups
    by_layer = [0] * 32
    for group in groups:
        if not group.policy.keeps_all:
            assert (group.policy.sink_size, group.policy.window_size) == (128, 256)
            for layer, _ in group.members:
                by_layer[layer] += 1
    assert max(by_layer) - min(by_layer) <= 1
    assert sum(by_layer) == pytest.approx(sparsity * 256, abs=1)


def test_if_every_head_streams_the_context_has_no_limit(tmp_path: Path) -> None:
    own = size_llama3(tmp_path, 1.0, num_layers=4).own
    assert own.max_context_tokens is None
    assert own.cache_tokens is None
    assert own.sequences[1 << 20] == own.sequences[32768] > 500


def test_more_of_anything_holds_no_less(tmp_path: Path) -> None:
    plans = [size_llama3(tmp_path, sparsity, num_layers=4) for sparsity in (0.0, 0.5, 0.75)]
    plans.append(size_llama3(tmp_path, 0.75, num_layers=4, gpu=find_gpu("h200")))
    for less, more in pairwise(plans):
        assert (less.own.max_context_tokens or 0) < (more.own.max_context_tokens or 0)
        for length in less.own.sequences:
            assert less.own.sequences[length] <= more.own.sequences[length]


def test_windows_of_the_models_own(tmp_path: Path) -> None:
    CONFIGS["gemma3"].save_pretrained(tmp_path)
    config = EngineConfig(model=str(tmp_path), dtype="float32", kv_cache_memory_bytes=ARENA)
    sizing = size_model(SizingRequest(config=config, even=EvenHeads(0.5)))
    assert [group.name for group in sizing.own.shape.groups] == [
        "retrieval", "streaming", "sliding-40"]  # fmt: skip
    assert sizing.no_profile is not None
    kept = [each.shape.growing_token_bytes
            for each in (sizing.own, sizing.no_profile, sizing.full_cache)]  # fmt: skip
    assert kept == [128, 256, 768]
    assert sizing.own.shape.constant_sequence_bytes > (
        sizing.no_profile.shape.constant_sequence_bytes
    )


def test_a_profile_is_checked_against_the_model(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    profile = random_profile(tiny_model("qwen3"), tmp_path / "p.json", seed=1)
    with pytest.raises(ConfigError, match="does not fit the model"):
        size_llama3(tmp_path, num_layers=2, profile=str(profile))


@pytest.mark.parametrize(
    ("changes", "message", "param"),
    [
        ({"gpu": find_gpu("4GiB")}, r"hold no sequence: .* 0\.9 of 4\.00 GiB is 3\.60", "gpu"),
        ({"gpu": None, "kv_cache_memory_bytes": 1000}, "1000 bytes hold", "kv_cache_memory_bytes"),
        ({"gpu": None}, "either gpu or kv_cache_memory_bytes", "gpu"),
        ({"kv_cache_memory_bytes": 1 << 30}, "either gpu or kv_cache_memory_bytes", "gpu"),
        ({"kv_cache_dtype": "float16"}, "layers make bfloat16 K and V", "kv_cache_dtype"),
        ({"quantization": "int4wo", "dtype": "float16"}, "computes in bfloat16", "dtype"),
        ({"lengths": (0,)}, "lengths must", "lengths"),
        ({"max_model_len": 9000}, "made for 8192 tokens", "max_model_len"),
        ({"sparsity": 1.5}, "sparsity must be in 0 to 1, got 1.5", "sparsity"),
        ({"sparsity": float("nan")}, "sparsity must be in 0 to 1", "sparsity"),
    ],
)
def test_what_cannot_be_planned(
    tmp_path: Path, changes: dict[str, object], message: str, param: str
) -> None:
    sparsity = changes.pop("sparsity", None)
    with pytest.raises(ConfigError, match=message) as caught:
        size_llama3(tmp_path, sparsity, num_layers=2, **changes)  # type: ignore[arg-type]
    assert caught.value.param == param


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_where_the_least_fits_a_full_cache_is_planned_too(tmp_path: Path, sparsity: float) -> None:
    """Halving the memory until nothing fits never leaves the comparison without a figure."""
    num_bytes = 1 << 26
    with pytest.raises(ConfigError, match="hold no sequence"):
        while True:
            sizing = size_llama3(
                tmp_path, sparsity, num_layers=2, gpu=None, kv_cache_memory_bytes=num_bytes,
                lengths=(8192,), max_num_seqs=1, max_num_batched_tokens=16,
            )  # fmt: skip
            assert (sizing.full_cache.max_context_tokens or 0) > 0
            num_bytes //= 2
    assert num_bytes < 1 << 22


def test_the_meta_device_holds_nothing(tmp_path: Path) -> None:
    module = size_llama3(tmp_path, num_layers=1).model.module
    assert {each.device for each in module.parameters()} == {torch.device("meta")}
