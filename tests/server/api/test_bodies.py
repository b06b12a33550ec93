import json

import pytest
from starlette.testclient import TestClient

from headlong.server.app import create_app
from headlong.server.config import ServerConfig

PATHS = ["/v1/completions", "/v1/chat/completions"]
JSON = {"content-type": "application/json"}


def deep(brackets: int) -> bytes:
    return b'{"model": "fake/model", "x": ' + b"[" * brackets + b"]" * brackets + b"}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"hello",
        b"null",
        b"[]",
        b'"text"',
        b"3",
        b"true",
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b'{"model": "fake/model", "prompt": "a", "unknown": NaN}',
        b'{"prompt": "\xff"}',
        b'\xff\xfe{\x00"\x00',
        rb'{"prompt": "\ud800"}',
        rb'{"messages": [{"role": "user", "content": "\udfff x"}]}',
        b'{"seed": ' + b"9" * 10_000 + b"}",
        deep(300),
        deep(90_000),
        b'{"a": 1} trailing',
    ],
)
def test_what_is_no_strict_json_object(client, engine, path, body):
    response = client.post(path, content=body, headers=JSON)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert len(response.content) < 1000
    assert not engine.seen


def test_a_number_that_overflows_to_infinity(client):
    body = b'{"model": "fake/model", "prompt": "a", "temperature": 1e999}'
    response = client.post(PATHS[0], content=body, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "temperature"


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "x"])
def test_other_content_types(client, kind):
    body = json.dumps({"model": "fake/model", "prompt": "a"}).encode()
    response = client.post(PATHS[0], content=body, headers={"content-type": kind} if kind else {})
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/x+json"])
def test_json_by_other_names(client, kind):
    body = json.dumps({"model": "fake/model", "prompt": "a"}).encode()
    assert client.post(PATHS[0], content=body, headers={"content-type": kind}).status_code == 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("declared", [True, False])
def test_bodies_over_the_limit(client, engine, path, declared):
    pieces = [b" " * 50_000] * 5
    content = b"".join(pieces) if declared else iter(pieces)
    response = client.post(path, content=content, headers=JSON)
    assert response.status_code == 413
    error = response.json()["error"]
    assert error["code"] == "request_too_large"
    assert "200000" in error["message"]
    assert not engine.seen


def test_a_body_of_just_the_limit_is_read(client):
    body = json.dumps({"model": "fake/model", "prompt": "a"}).encode()
    body += b" " * (200_000 - len(body))
    assert client.post(PATHS[0], content=body, headers=JSON).status_code == 200
    assert client.post(PATHS[0], content=body + b" ", headers=JSON).status_code == 413


def test_the_limit_follows_the_models_context(engine):
    limit = (4 << 20) + 16 * engine.max_model_len
    body = json.dumps({"model": "m", "prompt": "a"}).encode()
    body += b" " * (limit - len(body))
    with TestClient(create_app(engine, ServerConfig(served_model_name=("m",)))) as client:
        assert client.post(PATHS[0], content=body, headers=JSON).status_code == 200
        response = client.post(PATHS[0], content=body + b" ", headers=JSON)
    assert response.status_code == 413
    assert str(limit) in response.json()["error"]["message"]


def test_variables_of_the_template_are_bounded(post):
    fits = {"tone": "x" * 65_000}
    assert "context" in post(PATHS[1], chat_template_kwargs=fits).json()["error"]["message"]
    over = {"tone": ["x" * 1000] * 66}
    error = post(PATHS[1], chat_template_kwargs=over).json()["error"]
    assert error["param"] == "chat_template_kwargs"
    assert "65536 bytes" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["x" * 1000] * 30 + [1] * 1000},
        {"messages": [{"role": 1, "content": 2}] * 1000},
        {"prompt": {str(index): None for index in range(5000)}},
        {"logit_bias": {"k" * 1000 + str(index): "x" for index in range(100)}},
        {"logit_bias": {str(index): "x" for index in range(5000)}},
        {"stop": ["x"] * 9000},
        {"user": ["x" * 40_000]},
        {"model": ["x" * 40_000]},
        dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "seed", "stop"), "x" * 1000)
        | dict.fromkeys(("stream", "ignore_eos", "skip_special_tokens", "user", "model"), 3)
        | {"min_tokens": "x", "max_tokens": "x", "add_special_tokens": 1},
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_what_errors_say_is_bounded(client, path, fields):
    body = {"model": "fake/model", **fields}
    response = client.post(path, content=json.dumps(body), headers=JSON)
    assert response.status_code == 400
    assert len(response.content) < 4000
    assert response.json()["error"]["message"].count(";") <= 10
