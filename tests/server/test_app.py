import pytest

from headlong.server.app import create_app
from headlong.server.config import ServerConfig
from headlong.server.errors import ConfigError


def test_models(client):
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["fake/model", "alias"]
    assert body["data"][0]["max_model_len"] == 64
    assert client.get("/v1/models/fake/model").json() == body["data"][0]


def test_an_unknown_model(client):
    response = client.get("/v1/models/other")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_health(client):
    response = client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_the_engine_lives_as_long_as_the_application(client, engine):
    assert engine.is_alive
    client.__exit__()
    assert not engine.is_alive


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("DELETE", "/health", 405),
    ],
)
def test_other_paths_and_methods(client, method, path, status):
    response = client.request(method, path, follow_redirects=False)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert ("allow" in response.headers) == (status == 405)


def test_the_chat_template_file_replaces_the_models(engine, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("Q: {{ messages[0].content }} A:")
    config = ServerConfig(served_model_name=("m",), chat_template=file)
    engine.tokenizer.chat_template = None
    from starlette.testclient import TestClient

    with TestClient(create_app(engine, config)) as client:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert engine.tokenizer.decode(engine.seen[0][0]) == "Q: hi A:"


def test_a_chat_template_that_cannot_be_read(engine, tmp_path):
    file = tmp_path / "template.jinja"
    for prepare in (lambda: None, lambda: file.write_bytes(b"\xff")):
        prepare()
        with pytest.raises(ConfigError, match="chat template"):
            create_app(engine, ServerConfig(served_model_name=("m",), chat_template=file))


@pytest.mark.parametrize("own", [True, False])
def test_a_chat_template_with_a_syntax_error_ends_the_start(engine, tmp_path, own):
    source = "{{ messages[0].content }}\n{% for x in %}"
    config = ServerConfig(served_model_name=("m",))
    if own:
        engine.tokenizer.chat_template = source
    else:
        file = tmp_path / "template.jinja"
        file.write_text(source)
        config = config.model_copy(update={"chat_template": file})
    with pytest.raises(ConfigError, match="line 2: ") as caught:
        create_app(engine, config)
    assert caught.value.param == "chat_template"


STATUSES = {
    ("/v1/completions", "post"): {400, 401, 404, 408, 413, 415, 429, 500, 503, 504},
    ("/v1/chat/completions", "post"): {400, 401, 404, 408, 413, 415, 429, 500, 503, 504},
    ("/v1/responses", "post"): {400, 401, 404, 408, 413, 415, 429, 500, 503, 504},
    ("/tokenize", "post"): {400, 401, 404, 408, 413, 415, 500},
    ("/detokenize", "post"): {400, 401, 404, 408, 413, 415, 500},
    ("/tokenizer_info", "get"): {401, 500},
    ("/version", "get"): {401, 500},
    ("/v1/models", "get"): {401, 500},
    ("/v1/models/{model}", "get"): {401, 404, 500},
}


@pytest.mark.parametrize(("path", "method"), STATUSES)
def test_openapi_tells_every_status(client, path, method):
    operation = client.get("/openapi.json").json()["paths"][path][method]
    responses = operation["responses"]
    errors = {str(status) for status in STATUSES[path, method]}
    assert set(responses) == {"200"} | errors
    for status in errors:
        schema = responses[status]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorResponse"}
    if method == "post":
        assert operation["requestBody"]["required"] is True


def test_openapi_tells_the_truth(client):
    spec = client.get("/openapi.json").json()
    for path in ("/v1/completions", "/v1/chat/completions"):
        content = spec["paths"][path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}
    assert "503" in spec["paths"]["/health"]["get"]["responses"]
    assert "HTTPValidationError" not in spec["components"]["schemas"]


def test_openapi_asks_for_a_key_where_one_is_needed(client, engine):
    spec = client.get("/openapi.json").json()
    assert "securitySchemes" not in spec["components"]
    config = ServerConfig(served_model_name=("m",), api_key=("hush-1",))
    spec = create_app(engine, config).openapi()
    [(name, scheme)] = spec["components"]["securitySchemes"].items()
    assert scheme == {"type": "http", "scheme": "bearer"}
    for path, operations in spec["paths"].items():
        for operation in operations.values():
            assert operation["security"] == ([] if path == "/health" else [{name: []}])
