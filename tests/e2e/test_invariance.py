"""The same request gives the same tokens however it is scheduled."""

from collections.abc import Callable
from pathlib import Path

import pytest

import headlong.server.engine.sequence as sequence_module
from headlong.server.engine.engine import Engine
from headlong.server.engine.request import EngineRequest
from support.engines import build_engine, greedy, random_profile, random_prompts, run
from support.tiny_models import VOCAB_SIZE

PROMPTS = random_prompts((300, 1, 33, 150, 16, 80), VOCAB_SIZE)
PARAMS = greedy(20)

Build = Callable[..., Engine]


MODELS = [
    ("qwen3", "auto"),
    ("gemma3", "auto"),
    ("gpt_oss", "auto"),
    ("embedded", "auto"),
    ("embedded", "int8"),
    ("embedded", "retrieval=int4,streaming=fp8"),
]
"""Models, and formats of K and V."""


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def build(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Build:
    model, kv_cache_dtype = request.param
    folder = tiny_model(model)
    profile = random_profile(folder, tmp_path_factory.mktemp("profile") / "p.json", seed=3)
    options: dict[str, object] = {"profile": str(profile), "kv_cache_dtype": kv_cache_dtype}

    def make(**changes: object) -> Engine:
        return build_engine(folder, **(options | changes))

    return make


@pytest.fixture(scope="module")
def expected(build: Build) -> list[list[int]]:
    engine = build()
    return [run(engine, [prompt], PARAMS)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("chunk", [1, 7, 64, 4096])
def test_chunk_sizes(build: Build, expected: list[list[int]], chunk: int) -> None:
    engine = build(max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 8))
    assert run(engine, PROMPTS, PARAMS) == expected


@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_block_sizes(build: Build, expected: list[list[int]], block_size: int) -> None:
    assert run(build(block_size=block_size), PROMPTS, PARAMS) == expected


def test_batch_mates(build: Build, expected: list[list[int]]) -> None:
    engine = build()
    for order in ([0, 1], [5, 0, 3], [4, 4, 4, 2, 1, 0, 5, 3]):
        assert run(engine, [PROMPTS[i] for i in order], PARAMS) == [expected[i] for i in order]


def test_late_arrivals(build: Build, expected: list[list[int]]) -> None:
    engine = build(max_num_batched_tokens=40)
    waiting = list(range(len(PROMPTS)))
    tokens: dict[str, list[int]] = {}
    steps = 0
    while waiting or engine.has_work:
        if waiting and steps % 3 == 0:
            index = waiting.pop(0)
            tokens[str(index)] = []
            engine.add_request(EngineRequest(str(index), PROMPTS[index], PARAMS))
        for output in engine.step():
            tokens[output.request_id].extend(output.token_ids)
        steps += 1
    assert [tokens[str(index)] for index in range(len(PROMPTS))] == expected


def test_preemption(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight completions in an arena that holds about three of them at their full length.

    Their lengths are left open and nothing is reserved for them: what is asked for is reserved.
    """
    monkeypatch.setattr(sequence_module, "UNASKED_COMPLETION_TOKENS", 1)
    prompts = random_prompts([16] * 8, VOCAB_SIZE, seed=9)
    params = greedy(60)
    engine = build()
    expected = [run(engine, [prompt], params)[0] for prompt in prompts]
    small = build(
        kv_cache_memory_bytes=engine.plan.full_sequence_bytes(80) * 13 // 4,
        block_size=8,
        max_num_batched_tokens=64,
        max_model_len=80,
    )
    assert run(small, prompts, params, asked_max_tokens=False) == expected
    assert small.scheduler.num_preemptions > 0
    small = Engine(small.config, small.model)
    assert run(small, prompts, params) == expected
    assert small.scheduler.num_preemptions == 0


def test_prefix_hits(build: Build, expected: list[list[int]]) -> None:
    """The same prompts again, then conversations that go on from what was said."""
    engine = build(block_size=8)
    assert run(engine, PROMPTS, PARAMS) == expected
    before = engine.stats()
    assert run(engine, PROMPTS, PARAMS) == expected
    for index, prompt in enumerate(PROMPTS):
        assert run(engine, [prompt], PARAMS)[0] == expected[index]
    longer = [prompt + answer + [5, 6, 7] for prompt, answer in zip(PROMPTS, expected, strict=True)]
    cold = build(block_size=8, enable_prefix_caching=False)
    for prompt in longer:
        assert run(engine, [prompt], PARAMS) == run(cold, [prompt], PARAMS)
    after = engine.stats()
    assert cold.stats().prefix_hits_total == 0
    looked_up = after.prefix_queries_total - before.prefix_queries_total
    assert (after.prefix_hits_total - before.prefix_hits_total) / looked_up > 0.8


def test_forks(build: Build, expected: list[list[int]]) -> None:
    """Several greedy completions of a prompt are the same, and its prompt is computed once."""
    engine = build(block_size=8)
    longest = max(range(len(PROMPTS)), key=lambda index: len(PROMPTS[index]))
    engine.add_request(EngineRequest("r", PROMPTS[longest], PARAMS, n=4))
    tokens: list[list[int]] = [[] for _ in range(4)]
    computed = 0
    while engine.has_work:
        for output in engine.step():
            tokens[output.index].extend(output.token_ids)
        computed += engine.stats().step_prefill_tokens
        engine.cache.check_integrity()
    assert tokens == [expected[longest]] * 4
    assert computed == len(PROMPTS[longest])
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)
