"""What a request may ask of the engine beside its tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from headlong.server.engine.engine import Engine
from headlong.server.engine.outputs import RequestOutput
from headlong.server.engine.request import EngineRequest, KVPolicy
from headlong.server.engine.sampling_params import SamplingParams, Structure
from headlong.server.errors import InvalidRequestError
from support.engines import (
    SINK_SIZE,
    WINDOW_SIZE,
    build_engine,
    greedy,
    random_profile,
    random_prompts,
    run,
)
from support.tiny_models import VOCAB_SIZE

PROMPTS = random_prompts([100, 90, 60], VOCAB_SIZE, seed=8)


@pytest.fixture
def build(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Engine]:
    folder = tiny_model("qwen3")
    profile = str(random_profile(folder, tmp_path / "p.json", seed=1))

    def make(**changes: object) -> Engine:
        settings: dict[str, object] = {"profile": profile, "max_model_len": 256, "block_size": 8}
        return build_engine(folder, **(settings | changes))

    return make


def serve(engine: Engine, *requests: EngineRequest) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {each.request_id: [] for each in requests}
    for each in requests:
        engine.add_request(each)
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.cache.check_integrity()
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)
    return outputs


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_full_beside_compressed_equals_a_server_of_its_own(build: Callable[..., Engine]) -> None:
    engine, full = build(kv_policy_tokens=512), build(profile=None)
    wide = build(sink_size=SINK_SIZE + 3, window_size=WINDOW_SIZE + 10)
    prompts = PROMPTS * 3
    policies = [
        *[KVPolicy(full=True)] * 3,
        *[KVPolicy(sink_size=SINK_SIZE + 3, window_size=WINDOW_SIZE + 10)] * 3,
        *[None] * 3,
    ]
    requests = [
        EngineRequest(str(index), prompt, greedy(20), kv_policy=policy)
        for index, (prompt, policy) in enumerate(zip(prompts, policies, strict=True))
    ]
    got = [tokens_of(each) for each in serve(engine, *requests).values()]
    expected = [run(each, PROMPTS, greedy(20)) for each in (full, wide, build())]
    assert got == [tokens for side in expected for tokens in side]
    # Were they all alike, nothing would be shown.
    assert expected[0] != expected[2] != expected[1]


def test_the_bytes_that_a_request_held_are_told(build: Callable[..., Engine]) -> None:
    engine = build(kv_policy_tokens=512, max_num_batched_tokens=16, max_num_seqs=4)
    requests = [
        EngineRequest("own", PROMPTS[0], greedy(20)),
        EngineRequest("full", PROMPTS[0], greedy(20), kv_policy=KVPolicy(full=True)),
    ]
    own, full = (each[-1] for each in serve(engine, *requests).values())
    assert own.kv_bytes_full == full.kv_bytes_full == engine.plan.full_sequence_bytes(120)
    assert full.kv_bytes_peak == engine.plan.full_sequence_bytes(119)
    assert own.kv_bytes_peak < full.kv_bytes_peak
    assert own.kv_bytes_peak >= engine.plan.sequence_bytes(119)


def test_blocks_that_completions_share_are_told_once(build: Callable[..., Engine]) -> None:
    engine = build()
    engine.add_request(EngineRequest("r", PROMPTS[0], greedy(20), n=4))
    most = told = full = 0
    while engine.has_work:
        for output in engine.step():
            told += output.kv_bytes_peak
            full += output.kv_bytes_full
        most = max(most, engine.stats().kv_bytes_owned)
    windows = 4 * engine.plan.shape.constant_sequence_bytes
    assert most <= told <= most + windows
    alone = engine.plan.full_sequence_bytes(120)
    assert full == alone + 3 * (alone - engine.plan.full_sequence_bytes(96))


def test_a_structure_that_cannot_be_compiled_leaves_nothing(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build()
    params = SamplingParams(max_tokens=2, structure=Structure("json_object"))

    def broken(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(engine._requests, "_compile", broken)
    with pytest.raises(RuntimeError, match="new thread"):
        engine.add_request(EngineRequest("r", PROMPTS[0], params))
    engine.abort("r")
    assert not engine.has_work


@pytest.mark.parametrize(
    ("changes", "asked", "said"),
    [
        ({}, KVPolicy(window_size=WINDOW_SIZE - 1), "window_size must be in 21, which is the"),
        ({}, KVPolicy(sink_size=SINK_SIZE - 1), "sink_size must be in 5, which is the profile's"),
        ({"kv_policy_max_sink_size": 9}, KVPolicy(sink_size=10), "sink_size must be in 5"),
        ({"kv_policy_max_window_size": 50}, KVPolicy(window_size=51), "to 50, got 51"),
        ({"kv_policy_max_window_size": 50}, KVPolicy(full=True), "window_size of at most 50"),
        ({"kv_policy_max_window_size": 0}, KVPolicy(window_size=50), "leaves kv_policy to"),
        (
            {"max_num_seqs": 1, "max_num_batched_tokens": 8, "arena_balance": "fixed"},
            KVPolicy(full=True),
            "of a request, and it needs 108: .* or with --kv-policy-tokens if --arena-balance is",
        ),
    ],
)
def test_policies_out_of_bounds(
    build: Callable[..., Engine], changes: dict[str, object], asked: KVPolicy, said: str
) -> None:
    engine = build(**changes)
    with pytest.raises(InvalidRequestError, match=said) as error:
        engine.add_request(EngineRequest("r", PROMPTS[0], greedy(8), kv_policy=asked))
    assert str(error.value.param).startswith("kv_policy")
    assert not engine.has_work


def test_without_streaming_heads_a_wider_policy_changes_nothing(
    build: Callable[..., Engine],
) -> None:
    engine = build(profile=None)
    expected = run(engine, PROMPTS)
    assert run(engine, PROMPTS, kv_policy=KVPolicy(full=True)) == expected


def test_a_wide_request_of_open_length_ends_where_the_cache_does(
    build: Callable[..., Engine],
) -> None:
    # All of the model's context over streaming heads, but less without.
    memory = build().plan.full_sequence_bytes(200)
    engine = build(max_num_seqs=1, max_num_batched_tokens=64, kv_cache_memory_bytes=memory)
    assert engine.max_model_len == 256
    params = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
    request = EngineRequest(
        "r", PROMPTS[0], params, asked_max_tokens=False, kv_policy=KVPolicy(full=True)
    )
    last = serve(engine, request)["r"][-1]
    assert last.finish_reason == "length"
    assert 0 < last.num_completion_tokens < 150


@pytest.mark.parametrize("chunk", [16, 256])
def test_prompt_logprobs_equal_transformers(
    build: Callable[..., Engine], tiny_model: Callable[[str], Path], chunk: int
) -> None:
    engine = build(profile=None, max_num_batched_tokens=chunk)
    model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3"), dtype=torch.float32)
    params = SamplingParams(
        max_tokens=2, temperature=0.0, ignore_eos=True, logprobs=1, prompt_logprobs=2
    )
    run(engine, PROMPTS)
    requests = [EngineRequest(str(i), prompt, params) for i, prompt in enumerate(PROMPTS)]
    for prompt, outputs in zip(PROMPTS, serve(engine, *requests).values(), strict=True):
        assert outputs[-1].num_cached_tokens == 0, "logits of cached tokens are not there"
        (reported,) = [each.prompt_logprobs for each in outputs if each.prompt_logprobs]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt])).logits[0]
        expected = torch.log_softmax(logits, dim=-1)
        assert [each.chosen.token_id for each in reported] == prompt[1:]
        for row, each in zip(expected, reported, strict=False):
            assert each.chosen.logprob == pytest.approx(float(row[each.chosen.token_id]), abs=1e-4)
            assert [top.token_id for top in each.top] == row.topk(2).indices.tolist()


def test_a_step_without_memory_fails_its_request_alone(build: Callable[..., Engine]) -> None:
    engine = build()
    expected = run(build(), PROMPTS, greedy(8))
    batches: list[list[str]] = []

    def no_memory(request_ids: Sequence[str]) -> None:
        batches.append(list(request_ids))
        if "1" in request_ids and len(batches) > 2:
            raise torch.OutOfMemoryError("planted")

    engine.before_forward = no_memory
    requests = [
        EngineRequest(str(index), prompt, greedy(8), n=2) for index, prompt in enumerate(PROMPTS)
    ]
    outputs = serve(engine, *requests)
    failed = [(each.index, each.error_code) for each in outputs["1"] if each.error]
    assert failed == [(0, "request_aborted"), (1, "request_aborted")]
    for index in (0, 2):
        for completion in (0, 1):
            tokens = [
                token
                for each in outputs[str(index)]
                if each.index == completion
                for token in each.token_ids
            ]
            assert tokens == expected[index]


def test_a_failure_that_is_not_for_want_of_memory_is_not_hidden(
    build: Callable[..., Engine],
) -> None:
    engine = build()

    def broken(_: Sequence[str]) -> None:
        raise RuntimeError("planted")

    engine.before_forward = broken
    engine.add_request(EngineRequest("r", PROMPTS[0], greedy(2)))
    with pytest.raises(RuntimeError, match="planted"):
        engine.step()


def test_time_runs_out_while_waiting_and_while_running(build: Callable[..., Engine]) -> None:
    engine = build(max_num_seqs=1)
    engine.add_request(EngineRequest("running", PROMPTS[0], greedy(100), timeout_s=3600.0))
    engine.step()
    engine.add_request(EngineRequest("waiting", PROMPTS[1], greedy(4), timeout_s=1e-9))
    (gone, token) = engine.step()
    assert (gone.request_id, gone.error_code) == ("waiting", "deadline_exceeded")
    assert token.request_id == "running"
    engine.abort("running")
    assert not engine.has_work
    engine.add_request(EngineRequest("late", PROMPTS[1], greedy(4), arrived=0.0, timeout_s=1.0))
    (gone,) = engine.step()
    assert gone.error_code == "deadline_exceeded"
    assert gone.finish_reason == "abort"
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)


@pytest.mark.parametrize("when", [0, 1, 3])
def test_aborting_a_request_ends_all_its_completions(
    build: Callable[..., Engine], when: int
) -> None:
    engine = build()
    engine.add_request(EngineRequest("r", PROMPTS[0], greedy(50), n=3))
    for _ in range(when):
        engine.step()
    engine.abort("r")
    assert not engine.has_work
    assert engine.step() == []
    engine.cache.check_integrity()
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)


def test_sampled_completions_differ_and_repeat(build: Callable[..., Engine]) -> None:
    engine = build()
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)

    def sampled() -> list[list[int]]:
        outputs = serve(engine, EngineRequest("r", PROMPTS[0], params, n=3))["r"]
        return [
            [token for each in outputs if each.index == index for token in each.token_ids]
            for index in range(3)
        ]

    first = sampled()
    assert len({tuple(tokens) for tokens in first}) == 3
    assert sampled() == first
    assert run(engine, [PROMPTS[0]], params) == first[:1]


def test_more_completions_than_may_run_are_refused(build: Callable[..., Engine]) -> None:
    engine = build(max_num_seqs=2)
    with pytest.raises(InvalidRequestError, match="n must be at most 2"):
        engine.add_request(EngineRequest("r", PROMPTS[0], greedy(2), n=3))
