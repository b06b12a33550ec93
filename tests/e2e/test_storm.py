"""Many requests of all kinds over a small arena: nothing leaks, and nobody notices the others."""

import random
from collections.abc import Callable
from pathlib import Path

from headlong.server.engine.engine import Engine
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams
from support.engines import build_engine, random_profile
from support.tiny_models import VOCAB_SIZE

NUM_REQUESTS = 200


def random_request(rng: random.Random) -> tuple[list[int], SamplingParams]:
    length = rng.choice((1, 2, 7, 8, 9, 30, 63, 64, 65, 150))
    greedy = rng.random() < 0.7
    params = SamplingParams(
        max_tokens=rng.choice((1, 2, 8, 9, 40)),
        temperature=0.0 if greedy else 1.0,
        top_p=rng.choice((1.0, 0.8)),
        top_k=rng.choice((0, 0, 5)),
        seed=rng.randrange(1000),
        repetition_penalty=rng.choice((1.0, 1.3)),
        frequency_penalty=rng.choice((0.0, 0.5)),
        stop=rng.choice(((), ("a",), ("e", "th"))),
        logprobs=rng.choice((None, 0, 3)),
    )
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)], params


def serve_alone(engine: Engine, prompt: list[int], params: SamplingParams) -> tuple[list[int], str]:
    engine.add_request(EngineRequest("alone", prompt, params))
    tokens: list[int] = []
    text = ""
    while engine.has_work:
        for output in engine.step():
            tokens.extend(output.token_ids)
            text += output.text
    return tokens, text


def test_storm(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_model("qwen3")
    profile = str(random_profile(folder, tmp_path / "p.json", seed=1))
    roomy = build_engine(folder, profile=profile)
    small = build_engine(
        folder,
        profile=profile,
        kv_cache_memory_bytes=roomy.plan.full_sequence_bytes(200) * 2,
        block_size=8,
        max_num_batched_tokens=40,
        max_model_len=200,
    )
    rng = random.Random(7)
    requests = {str(index): random_request(rng) for index in range(NUM_REQUESTS)}
    waiting = list(requests)
    tokens: dict[str, list[int]] = {name: [] for name in requests}
    texts = dict.fromkeys(requests, "")
    running: set[str] = set()
    finished: set[str] = set()
    while waiting or small.has_work:
        for _ in range(rng.randrange(3)):
            if waiting:
                name = waiting.pop()
                small.add_request(EngineRequest(name, *requests[name]))
                running.add(name)
        for output in small.step():
            tokens[output.request_id].extend(output.token_ids)
            texts[output.request_id] += output.text
            if output.finish_reason is not None:
                running.remove(output.request_id)
                finished.add(output.request_id)
        if running and rng.random() < 0.1:
            leaving = rng.choice(sorted(running))
            running.remove(leaving)
            small.abort(leaving)
        small.cache.check_integrity()
    assert small.cache.owned_blocks == (0,) * len(small.groups)
    assert small.scheduler.num_preemptions > 0
    assert len(finished) > NUM_REQUESTS // 2
    for name in sorted(finished):
        assert (tokens[name], texts[name]) == serve_alone(roomy, *requests[name]), name
