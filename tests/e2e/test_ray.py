"""Two replicas behind Ray Serve on loopback: what clients and the operator see of them."""

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from headlong.demo.paths import MODEL_DIR
from headlong.server.app import create_app
from headlong.server.async_engine import AsyncEngine
from headlong.server.config import ServerConfig
from support.engines import build_engine
from support.ray_cluster import (
    API_KEY,
    RayServer,
    Samples,
    Stream,
    ray_server,
    scrape,
    scrape_until,
)
from support.servers import body

MAX_QUEUED = 10
NUM_RUNNING = 16
OWNED = [("kv_cache_blocks", (group, "owned")) for group in ("retrieval", "streaming")]
HITS, QUERIES = ("prefix_cache_hits_total", ()), ("prefix_cache_queries_total", ())
ACTOR = "ray::ServeReplica:headlong:engine"


@pytest.fixture(scope="module")
def server() -> Iterator[RayServer]:
    with ray_server(f"--max-num-queued-reqs={MAX_QUEUED}", "--shutdown-timeout=20") as running:
        yield running


@pytest.fixture(scope="module")
def alone() -> Iterator[TestClient]:
    """The same model behind one engine."""
    engine = build_engine(
        MODEL_DIR,
        profile=str(MODEL_DIR / "profile.json"),
        kv_cache_memory_bytes=64 << 20,
        max_model_len=2048,
    )
    config = ServerConfig(served_model_name=("demo",))
    with TestClient(create_app(AsyncEngine(engine), config)) as client:
        yield client


def test_answers_are_those_of_one_engine(server: RayServer, alone: TestClient) -> None:
    prompts = [[10 + (seed * index) % 400 for index in range(40 * seed)] for seed in range(1, 7)]
    completions = [body(prompt=prompt, max_tokens=24, logprobs=2) for prompt in prompts]
    messages = [{"role": "user", "content": "What is in the drawer of the archive?"}]
    chat = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 24}
    n_best = {**chat, "n": 3, "temperature": 1.0, "seed": 5}

    async def ask(client: httpx.AsyncClient, path: str, data: object) -> Any:
        response = await client.post(path, json=data)
        assert response.status_code == 200, response.text
        assert len(response.headers.get_list("x-request-id")) == 1
        return response.json()

    async def ask_all() -> list[Any]:
        async with server.client() as client:
            requests = [ask(client, "/v1/completions", each) for each in completions]
            requests += [ask(client, "/v1/chat/completions", each) for each in (chat, n_best)]
            return list(await asyncio.gather(*requests))

    answers = asyncio.run(ask_all())
    expected = [alone.post("/v1/completions", json=each).json() for each in completions]
    expected += [alone.post("/v1/chat/completions", json=each).json() for each in (chat, n_best)]
    for answer, wanted in zip(answers, expected, strict=True):
        assert _said(answer) == _said(wanted)
        for name in ("prompt_tokens", "completion_tokens"):
            assert answer["usage"][name] == wanted["usage"][name]

    async def stream_all() -> list[str]:
        async with server.client() as client:
            streams = [Stream(client, **each) for each in completions]
            ends = [await each.wait_end() for each in streams]
            assert set(ends) == {"[DONE]"}
            assert {each.headers["content-type"] for each in streams} == {
                "text/event-stream; charset=utf-8"
            }
            return [each.text for each in streams]

    assert asyncio.run(stream_all()) == [each["choices"][0]["text"] for each in expected[:-2]]


def _said(answer: dict[str, Any]) -> list[object]:
    return [
        (each["finish_reason"], each.get("text"), each.get("message", {}).get("content"))
        for each in answer["choices"]
    ]


def test_a_key_is_needed_and_health_is_not(server: RayServer) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/health").json() == {"status": "ok"}
        for path in ("/v1/models", "/metrics", "/status"):
            refused = client.get(path)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        client.headers["Authorization"] = f"Bearer {API_KEY}"
        assert client.get("/ready").json() == {"status": "ready"}
        assert client.get("/v1/models").json()["data"][0]["id"] == "demo"
        wrong = client.post("/v1/completions", json=body(temperature="hot"))
        assert wrong.status_code == 400
        assert wrong.json()["error"]["param"] == "temperature"
        large = client.post("/v1/completions", content=b"[" * (8 << 20))
        assert large.status_code in {413, 415}


def test_a_client_that_leaves_frees_its_blocks(server: RayServer) -> None:
    async def scenario() -> None:
        async with server.client() as client:
            streams = [Stream(client, prompt=f"{each}", max_tokens=2000) for each in range(4)]
            for stream in streams:
                await stream.wait_events(3)
            # A whole answer, too, is given up when nobody waits for it.
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/completions", json=body(max_tokens=2000), timeout=0.5)
            for stream in streams:
                await stream.leave()
            at_rest = await scrape_until(
                client,
                lambda samples: (
                    samples["num_requests_running", ()] == 0
                    and not any(samples[each] for each in OWNED)
                ),
            )
            assert at_rest["num_replicas", ()] == 2
            # It would be that of a stranger: an engine may be on another machine.
            assert not any(name.startswith("engine_process") for name, _ in at_rest)
            cancelled = at_rest["request_success_total", ("cancelled",)]
            assert cancelled == 5

    asyncio.run(scenario())


def test_too_many_requests_are_turned_away(server: RayServer) -> None:
    async def scenario() -> None:
        async with server.client() as client:
            # Two replicas run eight each, and ten may wait.
            streams: list[Stream] = []

            def all_there(samples: Samples) -> bool:
                there = samples["num_requests_running", ()] + samples["num_requests_waiting", ()]
                return there == len(streams)

            while len(streams) < NUM_RUNNING + MAX_QUEUED:
                batch = 8 if len(streams) < NUM_RUNNING else 1
                streams += [Stream(client, prompt=f"{i}", max_tokens=1900) for i in range(batch)]
                await scrape_until(client, all_there)
            full = await scrape(client)
            assert full["num_requests_running", ()] == NUM_RUNNING
            refused = await client.post("/v1/completions", json=body())
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "queue_full"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            last = streams.pop()
            for stream in streams:
                await stream.leave()
            await last.wait_events(2)
            await last.leave()

    asyncio.run(scenario())


def test_shared_prefixes_are_found_as_often_as_by_one_engine(
    server: RayServer, alone: TestClient
) -> None:
    rng = random.Random(3)
    heads = [[rng.randrange(10, 400) for _ in range(256)] for _ in range(4)]
    prompts = [[*head, *(rng.randrange(10, 400) for _ in range(8))] for head in heads * 8]
    requests = [body(prompt=prompt, max_tokens=2) for prompt in prompts]

    async def scenario() -> float:
        async with server.client() as client:
            before = await scrape(client)
            # The first of each prefix, and then the others, several at a time.
            for begin in range(0, len(requests), 4):
                batch = requests[begin : begin + 4]
                await asyncio.gather(*(client.post("/v1/completions", json=each) for each in batch))
            after = await scrape(client)
            both = [
                after[name, labels] - before[name, labels]
                for name, labels in after
                if name == "replica_prompt_tokens_total"
            ]
            assert all(both), "one replica did nothing"
            return (after[HITS] - before[HITS]) / (after[QUERIES] - before[QUERIES])

    for each in requests:
        assert alone.post("/v1/completions", json=each).status_code == 200
    status = alone.get("/status").json()["prefix_cache"]
    rate = asyncio.run(scenario())
    assert rate > 0.9 * status["hit_rate"] > 0.5


def test_a_killed_replica_loses_its_own_streams(server: RayServer) -> None:
    async def scenario() -> None:
        async with server.client() as client:
            before = await scrape(client)
            streams = [Stream(client, prompt=f"{each}", max_tokens=400) for each in range(8)]
            for stream in streams:
                await stream.wait_events(3)
            os.kill(server.processes(ACTOR)[0], signal.SIGKILL)
            # New requests go on at once.
            answers = [client.post("/v1/completions", json=body(prompt=f"x{i}")) for i in range(4)]
            assert {each.status_code for each in await asyncio.gather(*answers)} == {200}
            ends = [await each.wait_end() for each in streams]
            lost = [each for each, end in zip(streams, ends, strict=True) if end != "[DONE]"]
            assert len(lost) == 4
            for stream in lost:
                error = await stream.wait_error()
                assert error["code"] == "engine_dead"
                assert error["type"] == "service_unavailable"
            after = await scrape(client)
            dead = ("request_success_total", ("engine_dead",))
            assert after[dead] - before[dead] == 4
            assert after["generation_tokens_total", ()] > before["generation_tokens_total", ()]

    asyncio.run(scenario())


def test_dead_engines_and_dead_replicas_are_replaced(server: RayServer) -> None:
    async def scenario() -> None:
        async with server.client() as client:
            stream = Stream(client, max_tokens=1900)
            await stream.wait_events(3)
            (busy,) = [
                labels
                for (name, labels), value in (await scrape(client)).items()
                if name == "replica_num_requests_running" and value
            ]
            for pid in server.processes("headlong.server.engine.worker"):
                os.kill(pid, signal.SIGKILL)
            error = await stream.wait_error()
            assert error["code"] == "engine_dead"
            assert "SIGKILL" in error["message"]
            # No engine is left: a request waits for the first new one, but for those that came
            # before the last one's death was known.
            while (answer := await client.post("/v1/completions", json=body())).status_code != 200:
                assert answer.json()["error"]["code"] == "engine_dead"
            await scrape_until(
                client,
                lambda samples: (
                    samples["num_replicas", ()] == 2
                    and ("replica_num_requests_running", busy) not in samples
                ),
            )

    asyncio.run(scenario())


def test_sigterm_finishes_what_runs_and_leaves_nothing(server: RayServer) -> None:
    """The last one: it ends the cluster."""

    async def scenario() -> None:
        async with server.client() as client:
            stream = Stream(client, max_tokens=300)
            await stream.wait_events(3)
            server.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(60):
                while (ready := await client.get("/ready")).status_code == 200:
                    pass
            assert ready.json()["error"]["code"] == "draining"
            refused = await client.post("/v1/completions", json=body())
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert await stream.wait_end() == "[DONE]"
            assert len(stream.events) == 301

    asyncio.run(scenario())
    assert server.process.wait(60) == 0
    assert server.processes() == []
