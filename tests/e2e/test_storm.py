"""Many mixed requests over a small arena: nothing leaks, and each is served as if it were alone."""

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import headlong.server.engine.sequence as sequence_module
from headlong.server.engine.engine import Engine
from headlong.server.engine.request import EngineRequest, KVPolicy
from headlong.server.engine.sampling_params import SamplingParams
from support.engines import SINK_SIZE, WINDOW_SIZE, crowded_engines, random_profile
from support.tiny_models import VOCAB_SIZE

NUM_REQUESTS = 400
MAX_MODEL_LEN = 200

Served = dict[int, tuple[list[int], str]]


def random_prompts(rng: random.Random) -> Callable[[], list[int]]:
    """Prompts that often begin alike, so that they find each other's blocks."""
    stems = [[rng.randrange(3, VOCAB_SIZE) for _ in range(120)] for _ in range(3)]

    def prompt() -> list[int]:
        stem = rng.choice(stems)[: rng.choice((0, 0, 16, 40, 77, 120))]
        return stem + [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 40))]

    return prompt


def random_params(rng: random.Random) -> SamplingParams:
    greedy = rng.random() < 0.5
    return SamplingParams(
        max_tokens=rng.randrange(1, 40),
        temperature=0.0 if greedy else 1.0,
        top_p=rng.choice((1.0, 0.8)),
        top_k=rng.choice((0, 0, 5)),
        seed=rng.randrange(1000),
        repetition_penalty=rng.choice((1.0, 1.3)),
        frequency_penalty=rng.choice((0.0, 0.5)),
        stop=rng.choice(((), ("a",), ("e", "th"))),
        logprobs=rng.choice((None, 0, 3)),
        prompt_logprobs=rng.choice((None, None, None, 2)),
    )


def random_request(name: str, prompt: list[int], rng: random.Random) -> EngineRequest:
    wider = KVPolicy(sink_size=SINK_SIZE + 4, window_size=WINDOW_SIZE + rng.randrange(30))
    return EngineRequest(
        name,
        prompt,
        random_params(rng),
        n=rng.choice((1, 1, 1, 2, 3)),
        asked_max_tokens=rng.random() < 0.1,
        priority=rng.randrange(-2, 3),
        tenant=rng.choice(("", "a", "b")),
        cache_salt=rng.choice(("", "", "salt")),
        kv_policy=rng.choice((None, None, wider, KVPolicy(full=True))),
        timeout_s=rng.choice((*[None] * 9, 1e-3)),
    )


def serve_alone(engine: Engine, request: EngineRequest) -> Served:
    engine.add_request(replace(request, timeout_s=None))
    served: Served = {index: ([], "") for index in range(request.n)}
    while engine.has_work:
        for output in engine.step():
            tokens, text = served[output.index]
            served[output.index] = (tokens + list(output.token_ids), text + output.text)
    return served


def test_storm(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where a length was left open next to nothing is reserved, so that blocks do run out.
    monkeypatch.setattr(sequence_module, "UNASKED_COMPLETION_TOKENS", 1)
    folder = tiny_model("qwen3")
    profile = random_profile(folder, tmp_path / "p.json", seed=1)
    roomy, small = crowded_engines(folder, profile, MAX_MODEL_LEN, max_num_batched_tokens=40)
    rng = random.Random(7)
    prompt = random_prompts(rng)
    requests = {
        str(index): random_request(str(index), prompt(), rng) for index in range(NUM_REQUESTS)
    }
    waiting = list(requests)
    served: dict[str, Served] = {}
    left: dict[str, int] = {}
    finished: set[str] = set()
    overdue: set[str] = set()
    while waiting or small.has_work:
        for _ in range(rng.randrange(6)):
            if waiting:
                name = waiting.pop()
                small.add_request(replace(requests[name], arrived=time.monotonic()))
                left[name] = requests[name].n
                served[name] = {index: ([], "") for index in range(requests[name].n)}
        for output in small.step():
            name = output.request_id
            tokens, text = served[name][output.index]
            served[name][output.index] = (tokens + list(output.token_ids), text + output.text)
            if output.error_code is not None:
                assert output.error_code == "deadline_exceeded"
                overdue.add(name)
            if output.finish_reason is not None:
                left[name] -= 1
                if not left[name]:
                    del left[name]
                    finished.add(name)
        if left and rng.random() < 0.1:
            leaving = rng.choice(sorted(left))
            del left[leaving]
            small.abort(leaving)
        small.cache.check_integrity()
    assert small.cache.owned_blocks == (0,) * len(small.groups)
    stats = small.stats()
    assert stats.preemptions_total > 0
    assert stats.prefix_hits_total > 0
    assert stats.prefix_misses_total["salt"] > 0
    assert overdue
    complete = finished - overdue
    assert len(complete) > NUM_REQUESTS // 2
    for name in sorted(complete):
        assert served[name] == serve_alone(roomy, requests[name]), name
