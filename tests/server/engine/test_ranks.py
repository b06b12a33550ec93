"""Two ranks in two processes, over gloo: what they compute together is what one computes alone.

Processes take seconds to start, so each architecture's pair serves all tests of it in turn, and the
last test ends it.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import pytest
import torch

import headlong.server.engine.sequence as sequence_module
from headlong.server.engine.engine import Engine
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.follower_link import FollowerLink
from headlong.server.engine.messages import encode
from headlong.server.engine.rank_messages import Open
from headlong.server.engine.request import EngineRequest, KVPolicy
from headlong.server.engine.runner import Runner
from headlong.server.engine.sampling_params import SamplingParams, Structure
from headlong.server.engine.token_scores import PagedForward
from headlong.server.errors import ConfigError, EngineDeadError, HeadlongError
from support.engines import build_engine, greedy, random_profile, random_prompts, run
from support.servers import wait_gone
from support.tiny_models import VOCAB_SIZE

PROMPTS = random_prompts((200, 1, 33, 150, 16, 80), VOCAB_SIZE)
PARAMS = greedy(20)
SAMPLED = SamplingParams(max_tokens=20, temperature=0.8, top_p=0.95, ignore_eos=True)
DIGITS = Structure("regex", "[0-9]{20}")
# Llama has heads that choose pages on both ranks, and what is preempted decodes so again; Mistral
# has weights that each rank draws; Gemma 3 has one layer without a window of its own, whose only
# retrieval head is on one of the ranks.
SETTINGS: dict[str, dict[str, object]] = {
    "llama": {"retrieval_budget": 64, "selection_reuse_steps": 4},
    "mistral": {"load_format": "dummy", "seed": 5},
    "gemma3": {"retrieval_budget": 64, "selection_reuse_steps": 4},
}


@dataclass
class Pair:
    """The same engine on one rank and on two."""

    name: str
    one: Engine
    two: Engine
    deaths: list[HeadlongError]
    died: threading.Event
    crowded: bool


@pytest.fixture(scope="module", params=SETTINGS)
def pair(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pair]:
    folder = tiny_model(request.param)
    profile = random_profile(folder, tmp_path_factory.mktemp("profile") / "p.json", seed=3)
    settings: dict[str, object] = {
        "profile": str(profile),
        "block_size": 8,
        "max_num_batched_tokens": 48,
        "max_model_len": 230,
        "canary_rate": 1.0,
        **SETTINGS[request.param],
    }
    one = build_engine(folder, **settings)
    # So little memory that a few sequences take blocks from each other.
    crowded = request.param == "llama"
    if crowded:
        settings["kv_cache_memory_bytes"] = one.plan.full_sequence_bytes(180)
    died = threading.Event()
    deaths: list[HeadlongError] = []

    def on_death(error: HeadlongError) -> None:
        deaths.append(error)
        died.set()

    two = build_engine(folder, on_death, tensor_parallel_size=2, **settings)
    yield Pair(request.param, one, two, deaths, died, crowded)
    two.close()


def answers(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Each prompt's tokens, one prompt at a time."""
    return [run(engine, [prompt], PARAMS)[0] for prompt in prompts]


def test_greedy_tokens_are_those_of_one_rank(pair: Pair) -> None:
    """Prompts in chunks of 48 tokens, beside each other; then again, from the prefix cache."""
    expected = answers(pair.one, PROMPTS)
    assert run(pair.two, PROMPTS, PARAMS) == expected
    again = [PROMPTS[3]] * 2
    hits = pair.two.stats().prefix_hits_total
    assert answers(pair.two, again) == [expected[3]] * 2
    assert pair.two.stats().prefix_hits_total > hits


def test_logits_are_those_of_one_rank(pair: Pair) -> None:
    def logits(runner: Runner, engine: Engine) -> torch.Tensor:
        return torch.cat(list(PagedForward(runner, engine.cache, 230, 64).logits(PROMPTS[0])))

    found = logits(pair.two._runner, pair.two)
    assert found.isfinite().all()
    torch.testing.assert_close(found, logits(pair.one._runner, pair.one), atol=1e-4, rtol=0)


def test_completions_that_share_a_prompt_are_forked_on_both_ranks(pair: Pair) -> None:
    pair.two.add_request(EngineRequest("r", PROMPTS[2], PARAMS, n=3))
    tokens: list[list[int]] = [[] for _ in range(3)]
    while pair.two.has_work:
        for output in pair.two.step():
            tokens[output.index].extend(output.token_ids)
        pair.two.cache.check_integrity()
    assert tokens == answers(pair.one, [PROMPTS[2]]) * 3


def test_a_wider_policy_is_one_for_both_ranks(pair: Pair) -> None:
    policy = KVPolicy(window_size=60)
    wide = run(pair.one, [PROMPTS[3]], PARAMS, kv_policy=policy)
    assert run(pair.two, [PROMPTS[3]], PARAMS, kv_policy=policy) == wide


def test_preemption(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_module, "UNASKED_COMPLETION_TOKENS", 1)
    params = greedy(50 if pair.crowded else 5)
    prompts = random_prompts([60] * 4, VOCAB_SIZE, seed=9)
    expected = [run(pair.one, [prompt], params)[0] for prompt in prompts]
    before = pair.two.scheduler.num_preemptions
    assert run(pair.two, prompts, params, asked_max_tokens=False) == expected
    assert (pair.two.scheduler.num_preemptions > before) == pair.crowded


def test_a_mix_beside_each_other(pair: Pair) -> None:
    """Seeds, structure, penalties, scored prompts and a wider policy, and one is given up."""
    requests = [
        EngineRequest("seeded", PROMPTS[2], replace(SAMPLED, seed=7), n=2),
        EngineRequest("aborted", PROMPTS[0], PARAMS),
        EngineRequest("structured", PROMPTS[4], replace(PARAMS, structure=DIGITS)),
        EngineRequest("scored", PROMPTS[5], replace(PARAMS, prompt_logprobs=2, logprobs=1)),
        EngineRequest("wide", PROMPTS[3], PARAMS, kv_policy=KVPolicy(window_size=60)),
        EngineRequest("penalised", PROMPTS[2], replace(PARAMS, repetition_penalty=1.3)),
    ]

    def serve(engine: Engine) -> tuple[dict[tuple[str, int], list[int]], list[float]]:
        tokens: dict[tuple[str, int], list[int]] = {}
        scores: list[float] = []
        for request in requests:
            engine.add_request(request)
        # Of its 200 tokens three steps have computed a part.
        outputs = [*chain.from_iterable(engine.step() for _ in range(3))]
        engine.abort("aborted")
        while engine.has_work:
            engine.cache.check_integrity()
            outputs += engine.step()
        for output in outputs:
            assert output.error is None
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
            scored = filter(None, output.prompt_logprobs or ())
            scores.extend(position.chosen.logprob for position in scored)
        engine.cache.check_integrity()
        return {key: found for key, found in tokens.items() if key[0] != "aborted"}, scores

    expected, expected_scores = serve(pair.one)
    tokens, scores = serve(pair.two)
    assert tokens == expected
    assert len(scores) == len(PROMPTS[5]) - 1
    assert scores == pytest.approx(expected_scores, abs=1e-3)


def test_finished_requests_are_scored_on_both_ranks(pair: Pair) -> None:
    def score(engine: Engine) -> tuple[int, float]:
        engine._canary.forget()
        before = engine.stats().canary
        run(engine, [PROMPTS[5]], PARAMS)
        while engine.idle_step():
            engine.cache.check_integrity()
        after = engine.stats().canary
        return after.tokens - before.tokens, after.kl_sum - before.kl_sum

    tokens, kl_sum = score(pair.two)
    assert tokens == 20
    assert kl_sum == pytest.approx(score(pair.one)[1], abs=1e-3)


def test_every_rank_says_what_it_has(pair: Pair) -> None:
    info, whole = pair.two.info(), pair.one.info()
    assert info.head_groups == whole.head_groups
    assert [group.num_heads for group in info.groups] == [group.num_heads for group in whole.groups]
    assert [rank.num_heads for rank in info.ranks] == [3, 3]
    retrieval = [rank.num_retrieval_heads for rank in info.ranks]
    assert sum(retrieval) == sum(group.num_heads for group in info.groups if not group.window_size)
    assert max(retrieval) - min(retrieval) <= 1
    budget = pair.two.config.kv_cache_memory_bytes
    assert budget is not None
    assert all(0 < rank.kv_bytes <= budget for rank in info.ranks)
    assert pair.two.arena.layout.total_bytes == info.ranks[0].kv_bytes
    lines = [line for line in info.lines if line.startswith("  rank ")]
    assert len(lines) == 2
    assert not [line for line in whole.lines if "rank" in line]


def test_a_rank_that_ends_ends_the_engine(pair: Pair) -> None:
    """A signal for all processes of a service does not end it; what else can, each in one pair."""
    ranks = pair.two._ranks
    assert ranks is not None
    (pid,), (link,) = ranks.pids, ranks._links
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    assert run(pair.two, [PROMPTS[4]], PARAMS) == answers(pair.one, [PROMPTS[4]])
    assert not pair.died.is_set()
    pair.two.add_request(EngineRequest("r", PROMPTS[0], PARAMS))
    pair.two.step()
    match pair.name:
        case "llama":
            reason = "the process of rank 1 ended by signal 9"
            os.kill(pid, signal.SIGKILL)
        case "mistral":
            reason = "rank 1 failed: AssertionError: a rank is opened once"
            link.send(encode(Open(pair.two.config, 1, "store")))
        case _:
            reason = "rank 0 has no memory for its part"
            ranks._local.forward = out_of_memory  # type: ignore[method-assign]
    if pair.name == "gemma3":
        # Unlike on one rank the step cannot run again: the other rank is in the midst of it.
        with pytest.raises(EngineDeadError, match=reason):
            pair.two.step()
        assert not pair.deaths
    else:
        assert pair.died.wait(60)
        assert reason in pair.deaths[0].message
        with pytest.raises(EngineDeadError, match="rank 1 "):
            pair.two.step()
    wait_gone(pid)


def out_of_memory(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("none left")


def test_a_model_that_cannot_be_cut_is_refused_at_start(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="layers of Phi3ForCausalLM") as caught:
        build_engine(tiny_model("phi3"), tensor_parallel_size=2)
    assert caught.value.param == "tensor_parallel_size"


def test_what_a_rank_cannot_load_is_said(tmp_path: Path) -> None:
    config = EngineConfig(model=str(tmp_path / "missing"), device="cpu", tensor_parallel_size=2)
    link = FollowerLink(config, 1, tmp_path / "store", None)
    try:
        with pytest.raises(ConfigError, match="there is no such folder"):
            link.wait("loaded")
    finally:
        link.kill()
