import base64
import json

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from headlong.server.api_keys import ApiKeys
from headlong.server.app import create_app
from headlong.server.auth import AuthMiddleware
from headlong.server.config import ServerConfig

BODY = {"model": "m", "prompt": "hi"}


def basic(user, password):
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


@pytest.fixture
def locked(engine, tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("alice:hush-a\nbob:hush:b\n")
    config = ServerConfig(
        served_model_name=("m",), api_key=("hush-1",), api_key_file=file, max_body_bytes=100
    )
    with TestClient(create_app(engine, config), raise_server_exceptions=False) as client:
        yield client


PATHS = [
    "/",
    "/page/main.js",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/metrics",
    "/status",
    "/ready",
    "/version",
    "/v1/models",
    "/v1/models/m",
    "/v1/completions",
    "/tokenize",
    "/nothing",
    "/health/",
    "//health",
    "/health/..",
    "/Health",
    "/v1/%2e%2e/health",
    "/health%00",
    "/%68ealth%2f",
    "/health;x",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD", "TRACE", "BREW"])
def test_every_path_is_locked(locked, method, path):
    response = locked.request(method, f"http://testserver{path}", follow_redirects=False)
    assert response.status_code == 401
    assert response.headers["x-request-id"]
    challenge = response.headers["www-authenticate"]
    assert "Bearer realm=" in challenge
    assert "Basic realm=" in challenge
    if method != "HEAD":
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


def test_only_health_is_open(locked):
    assert locked.get("/health").status_code == 200
    assert locked.get("/health?x=/v1/models").status_code == 200
    # Encoded or not, the path that is routed on is the one that is open.
    assert locked.get("/%68ealth").status_code == 200


@pytest.mark.parametrize(
    ("headers", "tenant"),
    [
        ({"Authorization": "Bearer hush-1"}, "key-1"),
        ({"Authorization": "bearer   hush-a "}, "alice"),
        ({"Authorization": "Bearer hush:b"}, "bob"),
        ({"Authorization": basic("", "hush-a")}, "alice"),
        ({"Authorization": basic("anybody", "hush:b")}, "bob"),
        ({"X-API-Key": "hush-a"}, "alice"),
        ({"Authorization": "Bearer wrong", "X-API-Key": "hush-a"}, "alice"),
    ],
)
def test_a_key_opens_and_names_the_tenant(locked, engine, headers, tenant):
    assert locked.post("/v1/completions", json=BODY, headers=headers).status_code == 200
    assert engine.requests[-1].tenant == tenant
    assert locked.get("/metrics", headers=headers).status_code == 200
    assert locked.get("/nothing", headers=headers).status_code == 404


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer hush-2",
        b"Bearer hush-1hush-1",
        b"Bearer key-1",
        b"Bearer hush-1,hush-a",
        b"hush-1",
        b"Token hush-1",
        b"Bearer: hush-1",
        b"Bearer \xff\xfe",
        "Bearer hüsh".encode(),
        b"Basic",
        b"Basic hush-1",
        b"Basic !!!!",
        b"Basic aHVzaC0x",  # the key without a user
        b"Basic " + base64.b64encode(b"hush-1:"),
        b"Basic " + base64.b64encode(b"\xff:\xff"),
        b"Basic " + base64.b64encode(b"u:hush-1\n"),
        b"Digest username=hush-1",
        b"Bearer " + b"x" * 60_000,
    ],
)
def test_what_is_no_key_is_refused(locked, value):
    response = locked.get("/v1/models", headers=[(b"authorization", value)])
    assert response.status_code == 401
    assert "hush" not in response.text


def test_nothing_else_carries_a_key(locked):
    for headers in (
        {"Cookie": "api_key=hush-1"},
        {"Proxy-Authorization": "Bearer hush-1"},
        {"Host": "testserver/health"},
        {"X-Original-URL": "/health", "X-Forwarded-Path": "/health"},
    ):
        assert locked.get("/v1/models?api_key=hush-1", headers=headers).status_code == 401


def test_without_keys_all_is_open(client, engine, post):
    assert client.get("/metrics").status_code == 200
    assert post("/v1/completions").status_code == 200
    assert engine.requests[-1].tenant == ""
    assert client.get("/v1/models", headers={"Authorization": "Bearer any"}).status_code == 200


def test_a_tenant_is_never_the_clients_choice(locked, engine):
    headers = {"Authorization": "Bearer hush-a", "X-Tenant": "bob", "tenant": "bob"}
    body = {**BODY, "user": "bob", "tenant": "bob"}
    assert locked.post("/v1/completions", json=body, headers=headers).status_code == 200
    assert engine.requests[-1].tenant == "alice"


def serve_one(scope):
    """Runs one connection; gives what was sent, and who was asked: the application, the body."""
    sent, asked = [], []

    async def app(scope, receive, send):
        asked.append("app")

    async def receive():
        asked.append("body")
        return {"type": "http.request", "body": b"x" * 10, "more_body": True}

    async def send(message):
        sent.append(message)

    middleware = AuthMiddleware(app, ApiKeys({"a": "hush"}))
    anyio.run(middleware, scope, receive, send)
    return sent, asked


def test_the_body_of_a_stranger_is_not_read():
    sent, asked = serve_one({"type": "http", "method": "POST", "path": "/x", "headers": []})
    assert sent[0]["status"] == 401
    assert asked == []
    json.loads(sent[1]["body"])


def test_other_protocols():
    sent, asked = serve_one({"type": "websocket", "path": "/health", "headers": []})
    assert (sent, asked) == ([{"type": "websocket.close", "code": 1008}], [])
    assert serve_one({"type": "lifespan"}) == ([], ["app"])


headers = st.lists(
    st.tuples(
        st.sampled_from([b"authorization", b"x-api-key", b"host", b"cookie"]),
        st.binary(max_size=60)
        | st.builds(
            lambda scheme, rest: scheme + b" " + rest,
            st.sampled_from([b"Bearer", b"Basic", b"bAsIc", b""]),
            st.binary(max_size=60) | st.binary(max_size=60).map(base64.b64encode),
        ),
    ),
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(headers=headers, path=st.text(max_size=30))
def test_no_header_breaks_it(headers, path):
    scope = {"type": "http", "method": "GET", "path": f"/{path}x", "headers": headers}
    sent, asked = serve_one(scope)
    assert sent[0]["status"] == 401
    assert asked == []


CORS = {"cors_allow_origin": ("https://page.example",), "api_key": ("hush-1",)}


def cors_client(engine, **given):
    return TestClient(create_app(engine, ServerConfig(served_model_name=("m",), **given)))


def preflight(client, origin):
    return client.options(
        "/v1/chat/completions",
        headers={
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        },
    )


def test_a_page_of_an_allowed_origin_may_ask(engine):
    with cors_client(engine, **CORS) as client:
        asked = preflight(client, "https://page.example")
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://page.example"
        assert "authorization" in asked.headers["access-control-allow-headers"]
        assert asked.headers["x-request-id"]
        origin = {"Origin": "https://page.example"}
        refused = client.get("/v1/models", headers=origin)
        # The page can read why.
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://page.example"
        served = client.get("/v1/models", headers={**origin, "Authorization": "Bearer hush-1"})
        assert served.status_code == 200
        assert "x-request-id" in served.headers["access-control-expose-headers"].lower()
        assert "access-control-allow-credentials" not in served.headers


def test_a_page_of_another_origin_may_not(engine):
    with cors_client(engine, **CORS) as client:
        for origin in ("https://other.example", "null", "https://page.example.evil"):
            assert preflight(client, origin).status_code == 400
            response = client.get("/v1/models", headers={"Origin": origin})
            assert "access-control-allow-origin" not in response.headers


def test_cors_is_off_by_default(client):
    response = preflight(client, "https://page.example")
    assert response.status_code == 405
    assert "access-control-allow-origin" not in response.headers
