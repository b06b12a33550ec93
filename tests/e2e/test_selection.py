"""Under a retrieval budget too the same request gives the same tokens however it is scheduled."""

from collections.abc import Callable
from pathlib import Path

import pytest

import headlong.server.engine.sequence as sequence_module
from headlong.server.engine.engine import Engine
from headlong.server.engine.request import EngineRequest
from support.engines import build_engine, greedy, random_profile, random_prompts, run
from support.tiny_models import VOCAB_SIZE

# The longest has more spans of pages than are looked at, the shortest never fills the budget.
PROMPTS = random_prompts((300, 90, 1100, 20, 560, 48), VOCAB_SIZE, seed=3)
PARAMS = greedy(24)
BUDGET = 72
BLOCK_SIZE = 8

Build = Callable[..., Engine]


@pytest.fixture(
    scope="module",
    params=[
        ("qwen3", {}),
        ("qwen3", {"selection_reuse_steps": 4}),
        ("qwen3", {"selection_reuse_steps": 8, "selection_min_similarity": 0.95}),
        ("embedded", {"selection_reuse_steps": 4}),
    ],
    ids=["steps-1", "steps-4", "similarity", "embedded"],
)
def build(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Build:
    name, selection = request.param
    folder = tiny_model(name)
    profile = random_profile(folder, tmp_path_factory.mktemp("profile") / "p.json", seed=3)

    def make(**changes: object) -> Engine:
        settings: dict[str, object] = {
            "profile": str(profile),
            "block_size": BLOCK_SIZE,
            "retrieval_budget": BUDGET,
            "max_model_len": 1200,
        }
        return build_engine(folder, **(settings | selection | changes))

    return make


@pytest.fixture(scope="module")
def expected(build: Build) -> list[list[int]]:
    engine = build(enable_prefix_caching=False)
    return [run(engine, [prompt], PARAMS)[0] for prompt in PROMPTS]


def test_the_budget_matters_and_covers_short_contexts(
    build: Build, expected: list[list[int]]
) -> None:
    dense = {"selection_reuse_steps": 1, "selection_min_similarity": None}
    answers = run(build(retrieval_budget=None, **dense), PROMPTS, PARAMS)
    assert answers != expected
    shortest = min(range(len(PROMPTS)), key=lambda index: len(PROMPTS[index]))
    assert len(PROMPTS[shortest]) + PARAMS.max_tokens <= BUDGET
    assert answers[shortest] == expected[shortest]
    assert run(build(retrieval_budget=1200), PROMPTS, PARAMS) == answers


@pytest.mark.parametrize("chunk", [16, 4096])
def test_chunk_sizes_and_batch_mates(build: Build, expected: list[list[int]], chunk: int) -> None:
    engine = build(max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 8))
    for order in ([5, 4, 3, 2, 1, 0], [4, 0, 4]):
        assert run(engine, [PROMPTS[i] for i in order], PARAMS) == [expected[i] for i in order]


def test_prefix_hits(build: Build, expected: list[list[int]]) -> None:
    """The same prompts again, then conversations that go on from what was said."""
    engine = build()
    for _ in range(2):
        assert run(engine, PROMPTS, PARAMS) == expected
    assert engine.stats().prefix_hits_total > 1000
    longer = [prompt + answer + [5, 6, 7] for prompt, answer in zip(PROMPTS, expected, strict=True)]
    cold = build(enable_prefix_caching=False)
    for prompt in longer:
        assert run(engine, [prompt], PARAMS) == run(cold, [prompt], PARAMS)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption(build: Build, monkeypatch: pytest.MonkeyPatch, prefix_caching: bool) -> None:
    """Eight completions where about three have room; their lengths are left open."""
    monkeypatch.setattr(sequence_module, "UNASKED_COMPLETION_TOKENS", 1)
    prompts = random_prompts([60, 90, 100, 20] * 2, VOCAB_SIZE, seed=9)
    params = greedy(60)
    engine = build()
    expected = [run(engine, [prompt], params)[0] for prompt in prompts]
    small = build(
        kv_cache_memory_bytes=engine.plan.full_sequence_bytes(180) * 13 // 4,
        max_num_batched_tokens=64,
        max_model_len=180,
        enable_prefix_caching=prefix_caching,
    )
    assert run(small, prompts, params, asked_max_tokens=False) == expected
    assert small.scheduler.num_preemptions > 0


def test_forks(build: Build, expected: list[list[int]]) -> None:
    engine = build()
    engine.add_request(EngineRequest("r", PROMPTS[0], PARAMS, n=3))
    tokens: list[list[int]] = [[] for _ in range(3)]
    while engine.has_work:
        for output in engine.step():
            tokens[output.index].extend(output.token_ids)
        engine.cache.check_integrity()
    assert tokens == [expected[0]] * 3
