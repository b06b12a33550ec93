"""Finished requests scored again over the full cache."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headlong.cache.policy import RETRIEVAL
from headlong.server.engine.canary import MAX_STARTS
from headlong.server.engine.engine import Engine
from headlong.server.engine.request import EngineRequest, KVPolicy
from headlong.server.engine.token_scores import PagedForward
from support.engines import engine_maker, greedy, random_prompts
from support.tiny_models import VOCAB_SIZE

PROMPT = random_prompts([90], VOCAB_SIZE, seed=4)[0]


@pytest.fixture
def build(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Engine]:
    return engine_maker(
        tiny_model("qwen3"),
        tmp_path,
        canary_rate=1.0,
        max_model_len=512,
        kv_policy_tokens=512,
    )


def serve(engine: Engine, name: str = "r", **options: object) -> list[int]:
    engine.add_request(EngineRequest(name, PROMPT, greedy(12), **options))  # type: ignore[arg-type]
    return [
        token
        for output in iter(lambda: engine.step() if engine.has_work else None, None)
        for each in output
        for token in each.token_ids
    ]


def logits_of(engine: Engine, tokens: list[int], *, full: bool) -> torch.Tensor:
    forward = PagedForward(engine._runner, engine.cache, 512)
    policies = engine.cache.policies(RETRIEVAL if full else None)
    return torch.cat(list(forward.logits(tokens, policies))).double()


def test_the_figures_are_those_of_two_whole_passes(build: Callable[..., Engine]) -> None:
    engine = build()
    tokens = PROMPT + serve(engine)
    assert engine.stats().canary.requests == 0
    while engine.idle_step():
        engine.cache.check_integrity()
    found = engine.stats().canary
    assert (found.requests, found.tokens) == (1, 12)
    served, full = (
        torch.log_softmax(logits_of(engine, tokens[:-1], full=full)[len(PROMPT) - 1 :], dim=-1)
        for full in (False, True)
    )
    expected = float((full.exp() * (full - served)).sum())
    assert expected > 1e-3, "the profile must cost something, or there is nothing to compare"
    assert found.kl_sum == pytest.approx(expected, rel=1e-4)
    assert found.top1_agreed == int((served.argmax(-1) == full.argmax(-1)).sum())
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)


def test_a_request_that_kept_everything_needs_no_second_look(build: Callable[..., Engine]) -> None:
    engine = build()
    serve(engine, kv_policy=KVPolicy(full=True))
    assert not engine.idle_step()
    assert engine.stats().canary.skipped == {"full_already": 1}


@pytest.mark.parametrize("full", [False, True])
def test_what_a_budget_costs_is_seen(build: Callable[..., Engine], full: bool) -> None:
    """What was decoded is decoded again, beside a reference in longer chunks."""
    engine = build(block_size=8, retrieval_budget=64)
    answer = serve(engine, kv_policy=KVPolicy(full=True) if full else None)
    while engine.idle_step():
        engine.cache.check_integrity()
    found = engine.stats().canary
    assert (found.requests, found.tokens) == (1, 12)
    tokens, since = (PROMPT + answer)[:-1], len(PROMPT) - 1
    reference = logits_of(engine, tokens, full=True)[since:]
    policies = engine.cache.policies(RETRIEVAL if full else None)
    chunks = list(engine.reader().logits(tokens, policies, since, len(PROMPT)))
    assert [len(chunk) for chunk in chunks] == [1] * 12
    served = torch.cat(chunks).double()
    p, q = torch.log_softmax(reference, dim=-1), torch.log_softmax(served, dim=-1)
    expected = float((p.exp() * (p - q)).sum())
    assert expected > 1e-3
    assert found.kl_sum == pytest.approx(expected, rel=1e-4)
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)


def test_a_budget_that_covers_the_request_costs_nothing(build: Callable[..., Engine]) -> None:
    engine = build(block_size=8, retrieval_budget=104)
    serve(engine, kv_policy=KVPolicy(full=True))
    assert not engine.idle_step()
    assert engine.stats().canary.skipped == {"full_already": 1}


def test_it_makes_way_for_requests_and_starts_over(build: Callable[..., Engine]) -> None:
    engine = build()
    tokens = serve(engine)
    assert engine.idle_step()
    assert engine.cache.owned_blocks != (0,) * len(engine.groups)
    assert serve(engine, "other", kv_policy=KVPolicy(full=True)) != []
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)
    engine.add_request(EngineRequest("running", PROMPT, greedy(2)))
    assert not engine.idle_step(), "requests come first"
    engine.abort("running")
    while engine.idle_step():
        pass
    assert engine.stats().canary.requests == 1
    assert engine.stats().canary.tokens == len(tokens)


def test_a_piece_is_one_pass_of_the_model(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that comes waits for the piece that runs: for no more than a chunk."""
    engine = build()
    tokens = serve(engine)
    sizes: list[int] = []
    forward = engine._runner.forward

    def counted(token_ids: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(len(token_ids))
        return forward(token_ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._runner, "forward", counted)
    monkeypatch.setattr(engine._canary._forward, "_chunk_tokens", 40)
    before = 0
    while engine.idle_step():
        assert len(sizes) - before <= 1
        before = len(sizes)
    whole = len(PROMPT) + len(tokens) - 1
    assert sizes == [40, 40, 40, 40, whole - 80, whole - 80]


def test_it_gives_up_what_is_interrupted_again_and_again(build: Callable[..., Engine]) -> None:
    engine = build()
    serve(engine)
    for _ in range(MAX_STARTS):
        assert engine.idle_step()
        engine._canary.make_way()
    assert engine.idle_step()
    assert engine.stats().canary.skipped == {"interrupted": 1}
    assert not engine.idle_step()


def test_what_does_not_fit_is_skipped(build: Callable[..., Engine]) -> None:
    engine = build(
        kv_policy_tokens=0,
        max_num_seqs=1,
        max_num_batched_tokens=16,
        block_size=8,
        arena_balance="fixed",
    )
    serve(engine)
    while engine.idle_step():
        engine.cache.check_integrity()
    assert engine.stats().canary.skipped == {"no_room": 1}
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)


def test_the_rate_is_a_share(build: Callable[..., Engine]) -> None:
    engine = build(canary_rate=0.25)
    for index in range(40):
        serve(engine, str(index))
        while engine.idle_step():
            pass
    assert 2 <= engine.stats().canary.requests <= 20
    silent = build(canary_rate=0.0)
    serve(silent)
    assert not silent.idle_step()
