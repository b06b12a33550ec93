"""Requests through the engine: how they end, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headlong.server.engine import engine as engine_module
from headlong.server.engine import runner as runner_module
from headlong.server.engine.describe import describe
from headlong.server.engine.engine import Engine
from headlong.server.engine.outputs import RequestOutput
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampler import SampledToken
from headlong.server.engine.sampling_params import SamplingParams
from headlong.server.engine.sequence import Sequence
from headlong.server.errors import ConfigError, ContextLengthError, InvalidRequestError
from support.engines import build_engine, greedy, random_profile, run

PROMPT = [10, 20, 30, 40]


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[[str], Path]) -> Engine:
    return build_engine(tiny_model("qwen3"), max_model_len=64)


def outputs_of(engine: Engine, params: SamplingParams) -> list[RequestOutput]:
    engine.add_request(EngineRequest("r", PROMPT, params))
    first, *outputs = engine.step()
    assert first.token_ids == ()
    assert first.queued_s is not None
    while engine.has_work:
        outputs += engine.step()
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)
    return outputs


def text_of(outputs: list[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)


def test_the_operator_is_told_where_it_runs(engine: Engine) -> None:
    expected = "device: cpu, float32, attention by torch, CUDA graphs off"
    assert describe(engine)[0] == expected


def test_the_operator_is_told_what_is_set_aside(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    profile = str(random_profile(folder, tmp_path / "p.json", seed=1))
    told = "  48 tokens of streaming are set aside for requests with a wider kv_policy"
    assert told in describe(build_engine(folder, profile=profile, kv_policy_tokens=48))
    plain = build_engine(folder, profile=profile), build_engine(folder, kv_policy_tokens=48)
    assert not any("set aside" in line for each in plain for line in describe(each))


def test_engines_share_a_model(engine: Engine) -> None:
    assert engine.config.kv_cache_memory_bytes is not None
    half = replace(engine.config, kv_cache_memory_bytes=engine.config.kv_cache_memory_bytes // 2)
    other = Engine(half, engine.model)
    assert other.model is engine.model
    assert run(other, [PROMPT]) == run(engine, [PROMPT])
    elsewhere = replace(engine.model, device=torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="cuda:0, and not on cpu"):
        Engine(half, elsewhere)


def test_eager_on_a_cpu_changes_nothing(engine: Engine) -> None:
    eager = Engine(replace(engine.config, enforce_eager=True), engine.model)
    assert run(eager, [PROMPT]) == run(engine, [PROMPT])


def test_a_backend_that_cannot_serve_the_model_is_named(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_backend(*args: object) -> object:
        raise ValueError("no kernel for a head of 7")

    monkeypatch.setattr(runner_module, "make_backend", make_backend)
    with pytest.raises(ConfigError, match="head of 7") as caught:
        Engine(engine.config, engine.model)
    assert caught.value.param == "attention_backend"


def test_length(engine: Engine) -> None:
    outputs = outputs_of(engine, greedy(5))
    assert [output.num_completion_tokens for output in outputs] == [1, 2, 3, 4, 5]
    assert [output.finish_reason for output in outputs] == [None] * 4 + ["length"]


def test_context_ends_a_completion(engine: Engine) -> None:
    outputs = outputs_of(engine, greedy(500))
    assert outputs[-1].finish_reason == "length"
    assert outputs[-1].num_completion_tokens == 64 - len(PROMPT)


def test_stop_token(engine: Engine) -> None:
    tokens = run(engine, [PROMPT], greedy(12))[0]
    stop = tokens[6]
    params = SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=(stop,))
    outputs = outputs_of(engine, params)
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_reason == stop
    assert outputs[-1].num_completion_tokens == tokens.index(stop) + 1
    assert outputs[-1].token_ids == (stop,)


def test_end_of_sequence_and_ignoring_it(engine: Engine) -> None:
    push = {2: 100.0}
    ending = SamplingParams(max_tokens=5, temperature=0.0, logit_bias=push)
    outputs = outputs_of(engine, ending)
    assert [output.finish_reason for output in outputs] == ["stop"]
    assert text_of(outputs) == ""
    going_on = SamplingParams(max_tokens=5, temperature=0.0, logit_bias=push, ignore_eos=True)
    assert outputs_of(engine, going_on)[-1].finish_reason == "length"
    held_off = SamplingParams(max_tokens=5, temperature=0.0, logit_bias=push, min_tokens=3)
    assert outputs_of(engine, held_off)[-1].num_completion_tokens == 4


@pytest.mark.parametrize("include", [False, True])
def test_stop_string(engine: Engine, include: bool) -> None:
    # 'ab' again and again: bytes 97 and 98 are tokens; which ids, the tokenizer says
    ids = engine.tokenizer.encode("a")
    params = SamplingParams(
        max_tokens=9,
        temperature=0.0,
        logit_bias={ids[0]: 100.0},
        stop=("aaa",),
        include_stop_str_in_output=include,
    )
    outputs = outputs_of(engine, params)
    assert text_of(outputs) == ("aaa" if include else "")
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_reason == "aaa"
    assert outputs[-1].num_completion_tokens == 3


def test_text_held_for_a_stop_string_is_shown_at_the_end(engine: Engine) -> None:
    ids = engine.tokenizer.encode("a")
    params = SamplingParams(
        max_tokens=4, temperature=0.0, logit_bias={ids[0]: 100.0}, stop=("aaaaaaa",)
    )
    assert text_of(outputs_of(engine, params)) == "aaaa"


def test_logprobs(engine: Engine) -> None:
    params = SamplingParams(max_tokens=3, temperature=0.0, logprobs=2)
    for output in outputs_of(engine, params):
        assert output.logprobs is not None
        (position,) = output.logprobs
        assert position.chosen.token_id == output.token_ids[0]
        assert position.chosen == position.top[0]
        assert len(position.top) == 2


def test_abort_frees_blocks(engine: Engine) -> None:
    engine.add_request(EngineRequest("running", PROMPT, greedy(20)))
    engine.add_request(EngineRequest("also", PROMPT, greedy(20)))
    engine.step()
    engine.add_request(EngineRequest("waiting", PROMPT, greedy(20)))
    assert sum(engine.cache.owned_blocks) > 0
    for request in ("waiting", "running", "also", "unknown"):
        engine.abort(request)
        engine.cache.check_integrity()
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)
    assert not engine.has_work


@pytest.mark.parametrize(
    ("prompt", "error", "says"),
    [
        ([], InvalidRequestError, "empty"),
        ([-1], InvalidRequestError, "token id -1"),
        ([320], InvalidRequestError, "token id 320"),
        ([5] * 64, ContextLengthError, "64 tokens"),
    ],
)
def test_prompts_that_are_refused(
    engine: Engine, prompt: list[int], error: type[InvalidRequestError], says: str
) -> None:
    with pytest.raises(error, match=says):
        engine.add_request(EngineRequest("r", prompt, greedy()))
    assert not engine.has_work


def test_bias_outside_the_vocabulary_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="999999"):
        engine.add_request(EngineRequest("r", PROMPT, SamplingParams(logit_bias={999999: 1.0})))


def test_sampling_repeats_with_a_seed(engine: Engine) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.5, seed=3, ignore_eos=True)
    first, second = run(engine, [PROMPT, PROMPT], params)
    assert first == second
    other = SamplingParams(max_tokens=8, temperature=1.5, seed=4, ignore_eos=True)
    assert run(engine, [PROMPT], other)[0] != first


def test_a_request_that_cannot_be_sampled_fails_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(logits: torch.Tensor, sequences: list[Sequence], eos: frozenset[int]) -> object:
        tokens = sample_tokens(logits, sequences, eos)
        if any(each.request_id == "bad" for each in sequences):
            raise RuntimeError("planted")
        return tokens

    sample_tokens = engine_module.sample
    params = SamplingParams(max_tokens=6, temperature=0.0, frequency_penalty=2.0, ignore_eos=True)
    expected = run(engine, [PROMPT], params)[0]
    monkeypatch.setattr(engine_module, "sample", sample)
    engine.add_request(EngineRequest("bad", PROMPT, greedy(6)))
    engine.add_request(EngineRequest("good", PROMPT, params))
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step()
    _, bad = (output for output in outputs if output.request_id == "bad")
    assert (bad.finish_reason, bad.error) == ("abort", "sampling failed: planted")
    good = [token for each in outputs if each.request_id == "good" for token in each.token_ids]
    assert good == expected
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_is_near_float32(
    tiny_model: Callable[[str], Path],
    dtype: str,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits of the first tokens, from a prefill and from a decode, alone and in a batch."""
    seen: list[torch.Tensor] = []

    def sample(logits: torch.Tensor, sequences: list[Sequence], eos: frozenset[int]) -> object:
        seen.extend(logits.clone())
        forced = [7 if each.num_output_tokens == 0 else 8 for each in sequences]
        return [SampledToken(token) for token in forced]

    monkeypatch.setattr(engine_module, "sample", sample)

    def logits_of(dtype: str, prompts: list[list[int]]) -> torch.Tensor:
        seen.clear()
        run(build_engine(tiny_model("llama"), dtype=dtype, max_model_len=64), prompts, greedy(2))
        return torch.stack(seen[-2 * len(prompts) :])

    exact = logits_of("float32", [PROMPT])
    alone = logits_of(dtype, [PROMPT])
    # As long as the first: of two prompts the shorter one comes first.
    batch = logits_of(dtype, [PROMPT, [9, 9, 9, 9]])[::2]
    for near in (alone, batch):
        assert not near.isnan().any()
        assert (near - exact).norm() / exact.norm() <= tolerance
