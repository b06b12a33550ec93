"""Traces of real requests, as a collector gets them."""

import asyncio
import io
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.testclient import TestClient

from headlong.demo.paths import MODEL_DIR
from headlong.server.app import create_app
from headlong.server.async_engine import AsyncEngine
from headlong.server.config import ServerConfig
from headlong.server.engine.engine import Engine
from headlong.server.engine.faults import Faults
from headlong.server.engine_link import EngineThread
from headlong.server.telemetry import request_traces
from headlong.server.telemetry.logs import configure_logs
from support.engines import build_engine
from support.otlp import Collector, Span, collector

CHUNK = 64
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
KEY = "open-sesame"
PHRASE = "the drawer of the year seventeen is empty. "
GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0, "ignore_eos": True, "max_tokens": 4}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return build_engine(
        MODEL_DIR,
        profile=str(MODEL_DIR / "profile.json"),
        max_model_len=1024,
        max_num_batched_tokens=CHUNK,
        kv_cache_memory_bytes=32 << 20,
    )


@pytest.fixture
def traces() -> Iterator[Collector]:
    with collector() as found:
        yield found


@contextmanager
def serving(engine: Engine, endpoint: str, faults: Faults | None = None, **given: Any) -> Any:
    """An application that traces; all spans have been sent when it is left."""
    config = ServerConfig(
        **{"served_model_name": ("demo", "alias"), "otlp_traces_endpoint": endpoint, **given}
    )
    app = create_app(AsyncEngine(EngineThread(engine, faults)), config)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def within(parent: Span, child: Span) -> bool:
    return parent.start <= child.start <= child.end <= parent.end


def test_a_request_is_a_tree_of_spans(engine: Engine, traces: Collector) -> None:
    prompt = PHRASE * 5
    with serving(engine, traces.endpoint) as client:
        ids = client.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
        for _ in range(2):
            response = client.post(
                "/v1/completions",
                json={**GREEDY, "model": "alias", "prompt": prompt, "top_p": 0.5},
                headers={"X-Request-Id": "mine"},
            )
            assert response.status_code == 200
    assert traces.paths == {"/v1/traces"}
    assert traces.resource["service.name"] == "headlong"
    cold, warm = traces.named("llm_request")
    assert cold.trace_id != warm.trace_id
    assert cold.parent_id == "" and not cold.failed
    about = cold.attributes
    latencies = {name: about.pop(name) for name in list(about) if ".latency." in name}
    assert about == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "headlong",
        "gen_ai.request.model": "alias",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.choice.count": 1,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": len(ids),
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "headlong.request_id": "mine",
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/completions",
    }
    queue, prefill, decode = traces.children(cold)
    assert [queue.name, prefill.name, decode.name] == ["queue", "prefill", "decode"]
    assert all(within(cold, each) for each in (queue, prefill, decode))
    assert queue.end <= prefill.start + 1000 and prefill.end == decode.start
    seconds = 1e-9 * (prefill.end - queue.start)
    assert latencies["gen_ai.latency.time_to_first_token"] == pytest.approx(seconds, abs=1e-5)
    assert latencies["gen_ai.latency.e2e"] <= 1e-9 * (cold.end - cold.start)
    assert len(latencies) == 6
    # Nobody else runs, so a chunk is a whole step; the first token comes with the last of them.
    sizes = [attributes for name, _, attributes in prefill.events if name == "prefill_chunk"]
    assert sum(each["tokens"] for each in sizes) == len(ids)
    assert [each["tokens"] for each in sizes[:-1]] == [CHUNK] * (len(ids) // CHUNK)
    times = [at for _, at, _ in prefill.events]
    assert times == sorted(times) and prefill.start <= times[0] and times[-1] <= prefill.end
    misses = {name: n for name, n in prefill.attributes.items() if "misses" in name}
    assert sum(misses.values()) == len(ids)
    assert decode.attributes["gen_ai.response.finish_reasons"] == ["length"]
    # The second one finds what the first one left.
    cached = warm.attributes["gen_ai.usage.cache_read.input_tokens"]
    again = next(each for each in traces.children(warm) if each.name == "prefill")
    assert cached == again.attributes["gen_ai.usage.cache_read.input_tokens"] > 0
    assert sum(each["tokens"] for _, _, each in again.events) == len(ids) - cached


def test_a_stream_belongs_to_the_clients_trace(engine: Engine, traces: Collector) -> None:
    body = {**GREEDY, "messages": [{"role": "user", "content": PHRASE}], "stream": True}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    with serving(engine, traces.endpoint) as client:
        response = client.post("/v1/chat/completions", json=body, headers=headers)
        assert response.text.endswith("data: [DONE]\n\n")
    request = traces.one("llm_request")
    assert (request.trace_id, request.parent_id) == (TRACE, PARENT)
    assert request.attributes["gen_ai.operation.name"] == "chat"
    assert request.attributes["gen_ai.usage.output_tokens"] == 4
    assert [each.name for each in traces.children(request)] == ["queue", "prefill", "decode"]


def test_a_response_is_traced_too(engine: Engine, traces: Collector) -> None:
    body = {"model": "demo", "input": "x", "max_output_tokens": 16}
    with serving(engine, traces.endpoint) as client:
        assert client.post("/v1/responses", json=body).status_code == 200
    request = traces.one("llm_request")
    assert request.attributes["http.route"] == "/v1/responses"
    assert request.attributes["gen_ai.request.model"] == "demo"
    assert [each.name for each in traces.children(request)] == ["queue", "prefill", "decode"]


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", "nonsense")],
        [("traceparent", f"00-{'0' * 32}-{PARENT}-01")],
        [("traceparent", f"00-{TRACE}-{PARENT}-01")] * 2,
        [("traceparent", "x" * 5000), ("tracestate", "," * 5000)],
    ],
)
def test_a_broken_parent_is_none(
    engine: Engine, traces: Collector, headers: list[tuple[str, str]]
) -> None:
    with serving(engine, traces.endpoint) as client:
        response = client.post("/v1/completions", json={**GREEDY, "prompt": "x"}, headers=headers)
        assert response.status_code == 200
    request = traces.one("llm_request")
    assert request.parent_id == "" and request.trace_id != TRACE


def test_opentelemetrys_own_variables_hold(
    engine: Engine, traces: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "night-shift")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    with serving(engine, f"{traces.endpoint}/elsewhere") as client:
        client.post("/v1/completions", json={**GREEDY, "prompt": "x"})
    assert traces.paths == {"/elsewhere"}
    assert traces.resource["service.name"] == "night-shift"
    assert traces.resource["deployment.environment.name"] == "test"


def test_a_client_that_does_not_sample_is_not_traced(engine: Engine, traces: Collector) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    with serving(engine, traces.endpoint) as client:
        response = client.post("/v1/completions", json={**GREEDY, "prompt": "x"}, headers=headers)
        assert response.status_code == 200
    assert traces.spans == []


def test_each_prompt_and_each_completion_has_its_spans(engine: Engine, traces: Collector) -> None:
    body = {**GREEDY, "temperature": 1, "prompt": ["one", "two words"], "n": 2}
    with serving(engine, traces.endpoint) as client:
        assert len(client.post("/v1/completions", json=body).json()["choices"]) == 4
    request = traces.one("llm_request")
    names = [each.name for each in traces.children(request)]
    assert sorted(names) == ["decode"] * 4 + ["prefill"] * 2 + ["queue"] * 2
    indices = [each.attributes["gen_ai.choice.index"] for each in traces.named("decode")]
    assert sorted(indices) == [0, 0, 1, 1]
    assert len({each.attributes["gen_ai.request.id"] for each in traces.named("decode")}) == 2
    assert request.attributes["gen_ai.usage.output_tokens"] == 16
    assert request.attributes["gen_ai.response.finish_reasons"] == ["length"] * 4


def test_a_request_that_is_turned_away_says_why(engine: Engine, traces: Collector) -> None:
    with serving(engine, traces.endpoint, api_key=(KEY,), max_body_bytes=2000) as client:
        known = {"Authorization": f"Bearer {KEY}"}
        bodies: list[tuple[dict[str, Any], dict[str, str]]] = [
            ({"prompt": "x"}, {}),
            ({"prompt": "x", "model": "other"}, known),
            ({"prompt": "x", "temperature": -1}, known),
            ({"prompt": "x" * 3000}, known),
            ({"prompt": "x", "max_tokens": 5000}, known),
        ]
        for fields, headers in bodies:
            client.post("/v1/completions", json={**GREEDY, **fields}, headers=headers)
        # What makes no text is not traced.
        client.post("/tokenize", json={"prompt": "x"}, headers=known)
        client.get("/v1/models", headers=known)
        client.get("/v1/completions", headers=known)
    told = [
        (each.attributes["http.response.status_code"], each.attributes["error.type"])
        for each in traces.spans
    ]
    assert told == [
        (401, "invalid_api_key"),
        (404, "model_not_found"),
        (400, "invalid_request_error"),
        (413, "request_too_large"),
        (400, "context_length_exceeded"),
    ]
    # It is the client's failure, and not the server's.
    assert not any(each.failed for each in traces.spans)
    assert all("gen_ai.usage.input_tokens" not in each.attributes for each in traces.spans)


def stream_until_a_token(
    engine: Engine, endpoint: str, then: Callable[[AsyncEngine, asyncio.Event], None]
) -> None:
    """Serves one long stream; `then` gets the engine, and what ends the client's connection."""
    config = ServerConfig(served_model_name=("demo",), otlp_traces_endpoint=endpoint)
    async_engine = AsyncEngine(EngineThread(engine, Faults(slow_step_s=0.01)))
    app = create_app(async_engine, config)
    body = json.dumps({**GREEDY, "prompt": PHRASE, "max_tokens": 900, "stream": True}).encode()

    async def main() -> None:
        left = asyncio.Event()
        requests = [{"type": "http.request", "body": body}]

        async def receive() -> dict[str, Any]:
            if requests:
                return requests.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message.get("body", b"").count(b'"text":"') and b"data:" in message["body"]:
                then(async_engine, left)

        async with app.router.lifespan_context(app):
            await app(
                {
                    "type": "http",
                    "method": "POST",
                    "path": "/v1/completions",
                    "raw_path": b"/v1/completions",
                    "query_string": b"",
                    "headers": [(b"content-type", b"application/json")],
                },
                receive,
                send,
            )

    asyncio.run(main())


def test_a_client_that_leaves(engine: Engine, traces: Collector) -> None:
    stream_until_a_token(engine, traces.endpoint, lambda _, left: left.set())
    request = traces.one("llm_request")
    assert request.attributes["gen_ai.response.finish_reasons"] == ["cancelled"]
    assert 0 < request.attributes["gen_ai.usage.output_tokens"] < 900
    assert not request.failed and "error.type" not in request.attributes
    assert [each.name for each in traces.children(request)] == ["queue", "prefill", "decode"]


def test_a_stream_that_the_servers_end_cuts(engine: Engine, traces: Collector) -> None:
    stream_until_a_token(engine, traces.endpoint, lambda running, _: running.end_streams())
    request = traces.one("llm_request")
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["gen_ai.response.finish_reasons"] == ["draining"]
    assert request.failed and request.attributes["error.type"] == "draining"


@pytest.mark.parametrize("stream", [True, False])
def test_the_engines_death(traces: Collector, tiny_model: Any, stream: bool) -> None:
    engine = build_engine(tiny_model("llama"), max_num_batched_tokens=CHUNK)
    body = {**GREEDY, "prompt": [[5] * 150], "max_tokens": 20, "stream": stream}
    with serving(engine, traces.endpoint, Faults(crash_at_step=5)) as client:
        response = client.post("/v1/completions", json=body)
        assert "engine_dead" in response.text
    # A stream whose first tokens were not sent yet becomes an ordinary answer.
    assert response.status_code == 503 or stream
    request = traces.one("llm_request")
    assert request.failed
    assert request.attributes["error.type"] == "engine_dead"
    assert request.attributes["gen_ai.response.finish_reasons"] == ["engine_dead"]
    prefill = traces.one("prefill")
    assert [each["tokens"] for _, _, each in prefill.events] == [CHUNK, CHUNK, 150 - 2 * CHUNK]
    assert traces.one("decode").attributes["gen_ai.usage.output_tokens"] == 2


def test_a_request_that_is_late(engine: Engine, traces: Collector) -> None:
    body = {**GREEDY, "prompt": PHRASE * 10, "max_tokens": 500, "timeout": 0.05}
    with serving(engine, traces.endpoint, Faults(slow_step_s=0.02)) as client:
        assert client.post("/v1/completions", json=body).status_code == 504
    request = traces.one("llm_request")
    assert request.failed and request.attributes["error.type"] == "deadline_exceeded"


def test_an_unexpected_error_tells_its_kind_alone(
    engine: Engine, traces: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError(PHRASE)

    monkeypatch.setattr("headlong.server.api.serving.Serving.respond", broken)
    with serving(engine, traces.endpoint) as client:
        assert client.post("/v1/completions", json={**GREEDY, "prompt": "x"}).status_code == 500
    request = traces.one("llm_request")
    assert request.failed and request.attributes["error.type"] == "ZeroDivisionError"
    assert request.events == []


def test_neither_texts_nor_keys_nor_tenants_are_sent(
    engine: Engine, traces: Collector, tmp_path: Any
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"the-tenant:{KEY}\n")
    with serving(engine, traces.endpoint, api_key_file=keys) as client:
        headers = {"Authorization": f"Bearer {KEY}"}
        body = {**GREEDY, "prompt": PHRASE, "user": "the-user", "cache_salt": "the-salt"}
        text = client.post("/v1/completions", json=body, headers=headers).json()["choices"][0]
        chat = {**GREEDY, "messages": [{"role": "user", "content": PHRASE}]}
        client.post("/v1/chat/completions?secret=1", json=chat, headers=headers)
        client.post("/v1/completions", json={**body, PHRASE: 1, "stop": 7}, headers=headers)
    assert len(traces.named("llm_request")) == 3
    sent = b"".join(traces.bodies)
    assert len(text["text"]) > 4
    for secret in (
        PHRASE.strip(),
        KEY,
        "the-tenant",
        "the-user",
        "the-salt",
        "secret",
        text["text"],
    ):
        assert secret.encode() not in sent


def test_a_line_in_the_log_has_the_trace(engine: Engine, traces: Collector) -> None:
    for log_format in ("text", "json"):
        stream = io.StringIO()
        with serving(engine, traces.endpoint, log_format=log_format) as client:
            configure_logs(ServerConfig(log_format=log_format))
            logging.getLogger().handlers[0].setStream(stream)  # type: ignore[attr-defined]
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            client.post("/v1/completions", json={**GREEDY, "prompt": "x"}, headers=headers)
            client.get("/v1/models")
        traced, plain = stream.getvalue().splitlines()
        if log_format == "json":
            assert json.loads(traced)["trace_id"] == TRACE
            assert "trace_id" not in json.loads(plain)
        else:
            assert traced.endswith(f" trace={TRACE}")
            assert "trace=" not in plain


@pytest.mark.parametrize("answers", [False, True])
def test_a_collector_that_is_down_harms_nobody(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """One that refuses connections, and one that takes them and says nothing."""
    monkeypatch.setattr(request_traces, "FLUSH_TIMEOUT_S", 0.1)
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if not answers:
            silent.close()
            port = 9
        else:
            port = silent.getsockname()[1]
        with serving(engine, f"http://127.0.0.1:{port}") as client:
            for _ in range(5):
                response = client.post("/v1/completions", json={**GREEDY, "prompt": "x"})
                assert response.status_code == 200
        flushing = [each for each in threading.enumerate() if each.name == "headlong-traces"]
        assert all(each.daemon for each in flushing)
