"""A thousand mixed requests over HTTP, whose clients often leave: nothing leaks, nobody notices.

Greedy completions that came to their end must equal what the same request gets alone.
"""

import asyncio
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

import headlong.server.engine.sequence as sequence_module
from headlong.server.app import create_app
from headlong.server.async_engine import AsyncEngine
from headlong.server.config import ServerConfig
from headlong.server.engine.engine import Engine
from headlong.server.listen import bind
from support.engines import SINK_SIZE, WINDOW_SIZE, crowded_engines, random_profile
from support.tiny_models import VOCAB_SIZE

NUM_REQUESTS = 1000
NUM_CLIENTS = 24
MAX_MODEL_LEN = 160

Body = dict[str, Any]
Answer = dict[int, tuple[list[int], str]]


def random_bodies(rng: random.Random) -> list[Body]:
    stems = [[rng.randrange(3, VOCAB_SIZE) for _ in range(90)] for _ in range(4)]

    def body() -> Body:
        stem = rng.choice(stems)[: rng.choice((0, 8, 33, 64, 90))]
        prompt = stem + [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 20))]
        window = {"window_size": WINDOW_SIZE + rng.randrange(20), "sink_size": SINK_SIZE + 2}
        options: Body = {
            "max_tokens": rng.choice((None, rng.randrange(1, 24))),
            "temperature": rng.choice((0, 0, 1)),
            "n": rng.choice((None, None, 1, 2, 3)),
            "stop": rng.choice((None, None, "a", ["th", "e"])),
            "cache_salt": rng.choice((None, None, "tenant")),
            "kv_policy": rng.choice((None, None, None, "full", window)),
            "priority": rng.choice((None, -3, 0, 3)),
            "logprobs": rng.choice((None, None, 1)),
            "timeout": rng.choice((*[None] * 15, 0.001)),
        }
        given = {name: value for name, value in options.items() if value is not None}
        return {
            "model": "m",
            "prompt": prompt,
            "ignore_eos": True,
            "return_token_ids": True,
            **given,
        }

    return [body() for _ in range(NUM_REQUESTS)]


@contextmanager
def serving(engine: Engine) -> Iterator[str]:
    app = create_app(AsyncEngine(engine), ServerConfig(served_model_name=("m",)))
    server = uvicorn.Server(uvicorn.Config(app, http="h11", log_level="error"))
    with bind("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


async def whole(client: httpx.AsyncClient, body: Body) -> Answer | None:
    response = await client.post("/v1/completions", json=body)
    if response.status_code == 504:
        assert "timeout" in body
        return None
    assert response.status_code == 200, response.text
    return {
        choice["index"]: (choice["token_ids"], choice["text"])
        for choice in response.json()["choices"]
    }


async def streamed(client: httpx.AsyncClient, body: Body, leave_after: int | None) -> Answer | None:
    """The streamed answer; None if the client left, or if time ran out."""
    answer: Answer = {index: ([], "") for index in range(body.get("n", 1))}
    request = body | {"stream": True}
    async with client.stream("POST", "/v1/completions", json=request) as response:
        if response.status_code == 504:
            assert "timeout" in body
            return None
        assert response.status_code == 200, await response.aread()
        num_events = 0
        async for line in response.aiter_lines():
            if leave_after is not None and num_events >= leave_after:
                return None
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            num_events += 1
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                assert event["error"]["code"] == "deadline_exceeded"
                return None
            for choice in event["choices"]:
                tokens, text = answer[choice["index"]]
                answer[choice["index"]] = (tokens + choice["token_ids"], text + choice["text"])
    return answer


async def send_all(url: str, bodies: list[Body], rng: random.Random) -> dict[int, Answer]:
    todo = list(enumerate(bodies))
    plans = [(rng.random() < 0.6, rng.random() < 0.3, rng.randrange(6)) for _ in bodies]
    answers: dict[int, Answer] = {}
    limits = httpx.Limits(max_connections=NUM_CLIENTS)

    async def work(client: httpx.AsyncClient) -> None:
        while todo:
            index, body = todo.pop()
            streams, leaves, after = plans[index]
            if streams:
                answer = await streamed(client, body, after if leaves else None)
            elif leaves:
                # A client that waits for the whole answer, and not long enough.
                try:
                    answer = await asyncio.wait_for(whole(client, body), after / 200)
                except TimeoutError:
                    answer = None
            else:
                answer = await whole(client, body)
            if answer is not None:
                answers[index] = answer

    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(work(client) for _ in range(NUM_CLIENTS)))
    return answers


def settle(engine: Engine) -> None:
    rest = threading.Event()
    for _ in range(300):
        if not engine.has_work and not any(engine.cache.owned_blocks):
            return
        rest.wait(0.1)
    raise AssertionError(f"blocks are owned and nothing runs: {engine.cache.owned_blocks}")


def test_storm(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where a length was left open next to nothing is reserved, so that blocks do run out.
    monkeypatch.setattr(sequence_module, "UNASKED_COMPLETION_TOKENS", 1)
    folder = tiny_model("qwen3")
    profile = random_profile(folder, tmp_path / "p.json", seed=1)
    roomy, small = crowded_engines(
        folder, profile, MAX_MODEL_LEN, max_num_batched_tokens=64, canary_rate=0.2
    )
    step = small.step

    def checked_step() -> object:
        outputs = step()
        small.cache.check_integrity()
        return outputs

    monkeypatch.setattr(small, "step", checked_step)
    rng = random.Random(11)
    bodies = random_bodies(rng)
    with serving(small) as url:
        answers = asyncio.run(send_all(url, bodies, rng))
        settle(small)
    small.cache.check_integrity()
    stats = small.stats()
    assert stats.preemptions_total > 0
    assert stats.prefix_hits_total > 0
    greedy = {index: each for index, each in answers.items() if bodies[index]["temperature"] == 0}
    assert len(greedy) > NUM_REQUESTS // 4
    with serving(roomy) as url, httpx.Client(base_url=url, timeout=60) as client:
        for index, answer in sorted(greedy.items()):
            body = {name: value for name, value in bodies[index].items() if name != "timeout"}
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            alone = {
                choice["index"]: (choice["token_ids"], choice["text"])
                for choice in response.json()["choices"]
            }
            assert answer == alone, body
