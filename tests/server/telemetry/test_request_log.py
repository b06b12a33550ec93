import io
import json
import logging
import re

import pytest
from starlette.testclient import TestClient

from headlong.server.app import create_app
from headlong.server.config import ServerConfig
from headlong.server.telemetry.logs import REQUEST_ID, configure_logs, escape_control
from headlong.server.telemetry.request_log import MAX_BODY_CHARS

BODY = {"model": "m", "prompt": "the secret prompt"}


@pytest.fixture
def serve(engine, monkeypatch):
    """Makes a client, and what reads the log since the last time; in JSON, as objects."""
    stream = io.StringIO()
    clients = []

    def start(**given):
        config = ServerConfig(served_model_name=("m",), **given)
        configure_logs(config)
        logging.getLogger().handlers[0].setStream(stream)
        client = TestClient(create_app(engine, config), raise_server_exceptions=False)
        clients.append(client.__enter__())

        def read():
            text = stream.getvalue()
            stream.seek(0)
            stream.truncate()
            lines = text.splitlines()
            return [json.loads(line) for line in lines] if config.log_format == "json" else lines

        return client, read

    yield start
    for client in clients:
        client.__exit__()


def test_every_response_has_an_id(serve):
    client, _ = serve(max_body_bytes=100)
    responses = [
        client.get("/health"),
        client.get("/nothing"),
        client.put("/v1/completions"),
        client.post("/v1/completions", content=b"{"),
        client.post("/v1/completions", json={**BODY, "prompt": "x" * 200}),
        client.post("/v1/completions", json=BODY),
        client.post("/v1/completions", json={**BODY, "stream": True}),
    ]
    assert [each.status_code for each in responses] == [200, 404, 405, 415, 413, 200, 200]
    ids = [each.headers["x-request-id"] for each in responses]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)


def test_an_unexpected_error_has_an_id(serve, engine):
    client, read = serve()
    engine.failure = RuntimeError("broken")
    response = client.post("/v1/completions", json=BODY, headers={"X-Request-Id": "mine"})
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "mine"
    assert "broken" not in response.text
    (line,) = [line for line in read() if "headlong.access" in line]
    assert "POST /v1/completions 500 " in line
    assert line.endswith(" error=internal_error id=mine")


@pytest.mark.parametrize("given", ["a", "x" * 128, "req-1/2=3", '"quoted"', "~!"])
def test_the_clients_own_id_is_kept(serve, given):
    client, read = serve()
    response = client.get("/v1/models", headers={"X-Request-Id": given})
    assert response.headers["x-request-id"] == given
    assert read()[0].endswith(f" id={given}")


@pytest.mark.parametrize(
    "given", [b"", b"x" * 129, b"two words", b"a\tb", b"a\xe9", b"\xff", b"a\x7f", b"a\x1b[31m"]
)
def test_an_id_that_could_be_anything_is_replaced(serve, given):
    client, read = serve()
    response = client.get("/v1/models", headers=[(b"x-request-id", given)])
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
    assert len(read()) == 1


def test_a_line_of_text_for_each_request(serve):
    client, read = serve(api_key=("hush-1",))
    headers = {"Authorization": "Bearer hush-1", "X-Request-Id": "r-1"}
    client.post("/v1/completions", json=BODY, headers=headers)
    client.post("/v1/completions?api_key=hush-1", json={**BODY, "model": "x"}, headers=headers)
    client.post("/v1/completions", json=BODY, headers={"X-Request-Id": "r-2"})
    # Standing for date and time, and for the milliseconds.
    shown = [
        re.sub(r" [0-9.]+ ms", " T ms", re.sub("^[-0-9]{10} [:0-9,]{12}", "D", line))
        for line in read()
    ]
    assert shown == [
        "D INFO headlong.access: POST /v1/completions 200 T ms tenant=key-1 id=r-1",
        "D INFO headlong.access: POST /v1/completions 404 T ms tenant=key-1 "
        "error=model_not_found id=r-1",
        "D INFO headlong.access: POST /v1/completions 401 T ms error=invalid_api_key id=r-2",
    ]


def test_an_object_for_each_request(serve):
    client, read = serve(log_format="json", api_key=("hush-1",))
    headers = {"Authorization": "Bearer hush-1", "X-Request-Id": "r-1"}
    client.post("/v1/completions", json={**BODY, "model": "x"}, headers=headers)
    (line,) = read()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+\+00:00", line.pop("time"))
    assert 0 <= line.pop("duration_ms") < 60_000
    assert line.pop("message").startswith("POST /v1/completions 404 ")
    assert line == {
        "level": "INFO",
        "logger": "headlong.access",
        "method": "POST",
        "path": "/v1/completions",
        "status": 404,
        "tenant": "key-1",
        "error": "model_not_found",
        "request_id": "r-1",
    }


def test_probes_are_only_logged_when_they_fail_or_in_debug(serve, engine):
    client, read = serve()
    for path in ("/health", "/ready", "/metrics", "/status"):
        client.get(path)
    assert read() == []
    engine.is_alive = False
    client.get("/health")
    engine.is_alive = True
    assert "GET /health 503" in read()[0]
    client, read = serve(log_level="debug")
    client.get("/health")
    assert any("DEBUG headlong.access: GET /health 200" in line for line in read())


def test_the_level_is_kept(serve):
    client, read = serve(log_level="warning")
    client.get("/v1/models")
    assert read() == []


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("stream", [True, False])
def test_prompts_and_completions_stay_out_of_the_log(serve, log_format, stream):
    client, read = serve(log_format=log_format, log_level="debug")
    for path, fields in (
        ("/v1/completions", {"prompt": "the secret prompt"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the secret prompt"}]}),
        ("/v1/completions", {"prompt": "the secret prompt", "temperature": "the secret prompt"}),
        ("/v1/completions", {"prompt": "the secret prompt" * 100}),
    ):
        client.post(path, json={"model": "m", "stream": stream, **fields})
    logged = str(read())
    assert "/v1/completions" in logged
    for text in ("secret", "Hello", "wör", "w\\u00f6r"):
        assert text not in logged


def test_bodies_are_not_logged_unless_that_is_asked_for():
    assert ServerConfig().log_requests is False


@pytest.mark.parametrize("log_requests", [False, True])
def test_keys_stay_out_of_the_log(serve, log_requests):
    client, read = serve(log_level="debug", api_key=("hush-hush",), log_requests=log_requests)
    for headers in (
        {"Authorization": "Bearer hush-hush"},
        {"X-API-Key": "hush-hush"},
        {"Authorization": "Bearer hush-hush-wrong"},
        {"Authorization": "Basic aHVzaC1odXNoOmh1c2gtaHVzaA=="},
    ):
        client.post("/v1/completions", json=BODY, headers=headers)
        client.get("/metrics", headers=headers)
    logged = str(read())
    assert "/v1/completions" in logged
    assert "hush" not in logged
    assert "aHVzaC1" not in logged


def test_bodies_are_logged_when_that_is_asked_for(serve, engine):
    client, read = serve(log_requests=True)
    client.post("/v1/completions", json=BODY, headers={"X-Request-Id": "r-1"})
    body, access = read()
    assert "headlong.requests: body of " in body
    assert '"prompt":"the secret prompt"' in body
    assert body.endswith(" id=r-1")
    assert "headlong.access" in access
    assert len(engine.requests) == 1


def test_only_the_beginning_of_a_body_is_logged(serve):
    client, read = serve(log_requests=True, log_format="json")
    content = json.dumps({**BODY, "prompt": "ü" * 5000}, ensure_ascii=False).encode()
    client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    body, _ = read()
    assert len(body["body"]) == MAX_BODY_CHARS
    assert body["body"].endswith("ü…")
    assert f"body of {len(content)} bytes" in body["message"]


def test_bodies_that_are_not_read_are_not_logged(serve):
    client, read = serve(log_requests=True, max_body_bytes=100, api_key=("hush-1",))
    client.post("/v1/completions", json=BODY)
    long = {**BODY, "prompt": "x" * 200}
    client.post("/v1/completions", json=long, headers={"Authorization": "Bearer hush-1"})
    client.get("/v1/models", headers={"Authorization": "Bearer hush-1"})
    assert len(lines := read()) == 3
    assert all("headlong.access" in line for line in lines)


FORGED = "\r\n2026-01-01 00:00:00,000 INFO forged: line\u2028\x85\x1b[31m"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_client_writes_a_line_of_its_own(serve, log_format):
    client, read = serve(log_requests=True, log_format=log_format)
    content = f'{{"model": "m", "prompt": "{FORGED}"}}'.encode()
    client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    client.get("/v1/models/%0d%0a2026%20INFO%20forged:%20line%1b[31m")
    client.get("/v1/models/" + "x" * 5000)
    lines = read()
    assert len(lines) == 4
    for line in map(str, lines):
        assert line.isprintable()
        assert len(line) < 3000


def test_a_traceback_cannot_look_like_lines(serve):
    _, read = serve()
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("headlong.x").exception("failed on %s", FORGED)
    first, *others = read()
    assert "ERROR headlong.x: failed on \\r\\n2026" in first
    assert len(others) > 2
    assert all(line.startswith("  | ") and line.isprintable() for line in others)


def test_control_characters_are_escaped():
    assert escape_control("a\tb\n\x00\x7f\x9b\u2029ü") == "a\\tb\\n\\x00\\x7f\\x9b\\u2029ü"


def test_other_libraries_only_speak_when_it_matters(serve):
    _, read = serve(log_level="debug", log_format="json")
    logging.getLogger("somelib").info("chatter")
    logging.getLogger("somelib").warning("%s", "it matters")
    assert [
        (line["logger"], line["message"]) for line in read() if line["logger"] != "asyncio"
    ] == [("somelib", "it matters")]


def test_outside_a_request_there_is_no_id(serve):
    _, read = serve(log_format="json")
    assert REQUEST_ID.get() is None
    logging.getLogger("headlong.x").info("hello")
    assert "request_id" not in read()[0]
