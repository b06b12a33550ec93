"""With compensation, too, the same request gives the same tokens however it is scheduled."""

from collections.abc import Callable
from pathlib import Path

import pytest

import headlong.server.engine.sequence as sequence_module
from headlong.server.engine.engine import Engine
from headlong.server.engine.request import EngineRequest, KVPolicy
from support.engines import build_engine, greedy, random_profile, random_prompts, run
from support.tiny_models import VOCAB_SIZE

PROMPTS = random_prompts((200, 1, 33, 90, 16), VOCAB_SIZE)
PARAMS = greedy(16)

Build = Callable[..., Engine]


@pytest.fixture(scope="module", params=["qwen3", "embedded"])
def build(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Build:
    folder = tiny_model(request.param)
    profile = random_profile(folder, tmp_path_factory.mktemp("profile") / "p.json", seed=3)

    def make(**changes: object) -> Engine:
        settings: dict[str, object] = {
            "profile": str(profile),
            "compensation": "on",
            "compensation_from_layer": 0,
        }
        return build_engine(folder, **(settings | changes))

    return make


@pytest.fixture(scope="module")
def expected(build: Build) -> list[list[int]]:
    engine = build(enable_prefix_caching=False)
    return [run(engine, [prompt], PARAMS)[0] for prompt in PROMPTS]


def test_it_changes_what_is_said(build: Build, expected: list[list[int]]) -> None:
    assert run(build(compensation="off", compensation_from_layer=1), PROMPTS, PARAMS) != expected


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunk_sizes(build: Build, expected: list[list[int]], chunk: int) -> None:
    engine = build(max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 8))
    assert run(engine, PROMPTS, PARAMS) == expected


@pytest.mark.parametrize("block_size", [8, 64])
def test_block_sizes(build: Build, expected: list[list[int]], block_size: int) -> None:
    assert run(build(block_size=block_size), PROMPTS, PARAMS) == expected


def test_prefix_hits(build: Build, expected: list[list[int]]) -> None:
    """The same prompts again, then conversations that go on from what was said."""
    engine, cold = build(block_size=8), build(block_size=8, enable_prefix_caching=False)
    longer = [prompt + answer + [5, 6, 7] for prompt, answer in zip(PROMPTS, expected, strict=True)]
    for _ in range(2):
        assert run(engine, PROMPTS, PARAMS) == expected
    for prompt in longer:
        assert run(engine, [prompt], PARAMS) == run(cold, [prompt], PARAMS)
    assert engine.stats().prefix_hits_total > 300


def test_preemption(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_module, "UNASKED_COMPLETION_TOKENS", 1)
    prompts, params = random_prompts([16] * 8, VOCAB_SIZE, seed=9), greedy(60)
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


def test_forks(build: Build, expected: list[list[int]]) -> None:
    engine = build(block_size=8)
    engine.add_request(EngineRequest("r", PROMPTS[0], PARAMS, n=3))
    tokens: list[list[int]] = [[] for _ in range(3)]
    while engine.has_work:
        for output in engine.step():
            tokens[output.index].extend(output.token_ids)
        engine.cache.check_integrity()
    assert tokens == [expected[0]] * 3


def test_wider_policies_beside_it(build: Build, expected: list[list[int]]) -> None:
    """A request that keeps everything has nothing to compensate for, and disturbs nobody."""
    engine = build(kv_policy_tokens=2048)
    whole = build(compensation="off", compensation_from_layer=1, kv_policy_tokens=2048)
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(EngineRequest(f"own {index}", prompt, PARAMS))
        engine.add_request(
            EngineRequest(f"full {index}", prompt, PARAMS, kv_policy=KVPolicy(full=True))
        )
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    assert [tokens[f"own {index}"] for index in range(len(PROMPTS))] == expected
    assert [tokens[f"full {index}"] for index in range(len(PROMPTS))] == run(
        whole, PROMPTS, PARAMS, kv_policy=KVPolicy(full=True)
    )
