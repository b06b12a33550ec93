"""The whole way: HTTP, engine, compressed cache and embedded model."""

import http.client
import json
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import uvicorn

from headlong.demo.paths import MODEL_DIR
from headlong.profiling.needles import NeedlePrompt, is_answered, needle_prompts
from headlong.profiling.prompts import token_counter
from headlong.server.app import create_app
from headlong.server.async_engine import AsyncEngine
from headlong.server.config import ServerConfig
from headlong.server.engine.engine import Engine
from headlong.server.listen import bind
from support.engines import build_engine

CONTEXT = 1024


@pytest.fixture(scope="module")
def engine() -> Engine:
    return build_engine(
        MODEL_DIR,
        profile=str(MODEL_DIR / "profile.json"),
        kv_cache_memory_bytes=64 << 20,
        max_model_len=2048,
        max_num_batched_tokens=512,
    )


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    config = ServerConfig(served_model_name=("demo",))
    app = create_app(AsyncEngine(engine), config)
    server = uvicorn.Server(uvicorn.Config(app, http="h11", log_level="error"))
    with bind("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def settled(engine: Engine) -> Iterator[None]:
    """Afterwards the engine comes to rest by itself, and owns nothing."""
    yield
    rest = threading.Event()
    for _ in range(200):
        if not engine.has_work and not any(engine.cache.owned_blocks):
            break
        rest.wait(0.1)
    assert not engine.has_work
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)
    engine.cache.check_integrity()


@pytest.fixture(scope="module")
def questions(engine: Engine) -> list[NeedlePrompt]:
    count = token_counter(engine.tokenizer, chat=True)
    return needle_prompts(count, CONTEXT, 5, seed=77)


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.mark.usefixtures("settled")
def test_needles_by_chat_stream_and_completion(url: str, questions: list[NeedlePrompt]) -> None:
    client = client_of(url)
    for question in questions:
        whole = client.chat.completions.create(model="demo", messages=question.chat, temperature=0)
        text = whole.choices[0].message.content
        assert is_answered(question.fact, text)
        assert whole.choices[0].finish_reason == "stop"
        chunks = client.chat.completions.create(
            model="demo", messages=question.chat, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        completion = client.completions.create(
            model="demo", prompt=question.completion, temperature=0, max_tokens=12
        )
        assert is_answered(question.fact, completion.choices[0].text)
        assert completion.usage.prompt_tokens > CONTEXT * 0.9


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"model": "demo", "prompt": "x", "temperature": NaN}', 400, None),
        (b'{"model": "demo", "prompt": "x", "temperature": 1e999}', 400, None),
        (b'{"model": "demo", "prompt": "\xff\xfe"}', 400, None),
        (b'{"model": "demo", "prompt": ""}', 400, None),
        (b'{"model": "demo", "prompt": [99999]}', 400, None),
        (b'{"model": "demo"', 400, None),
        (b'{"model": "other", "prompt": "x"}', 404, "model_not_found"),
        (
            json.dumps({"model": "demo", "prompt": "word " * 4000}).encode(),
            400,
            "context_length_exceeded",
        ),
    ],
)
def test_bad_input_is_refused_and_the_server_goes_on(
    url: str, body: bytes, status: int, code: str | None
) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{url}/v1/completions", content=body, headers=headers)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == code
    assert "Traceback" not in response.text
    good = {"model": "demo", "prompt": "The access code", "max_tokens": 2}
    assert httpx.post(f"{url}/v1/completions", json=good).status_code == 200


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_free_their_blocks(
    url: str, engine: Engine, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request is seen to run, and is then aborted long before its 1500 tokens."""
    address = urlsplit(url)
    added, aborted = threading.Semaphore(0), threading.Semaphore(0)
    add_request, abort = engine.add_request, engine.abort
    progress: list[int] = []

    def watch_add(*args: object) -> None:
        add_request(*args)  # type: ignore[arg-type]
        added.release()

    def watch_abort(request_id: str) -> None:
        running = [*engine.scheduler.running, *engine.scheduler.waiting]
        progress.extend(s.num_output_tokens for s in running if s.request_id == request_id)
        abort(request_id)
        aborted.release()

    monkeypatch.setattr(engine, "add_request", watch_add)
    monkeypatch.setattr(engine, "abort", watch_abort)
    body = json.dumps(
        {
            "model": "demo",
            "prompt": "The access code",
            "max_tokens": 1500,
            "ignore_eos": True,
            "stream": stream,
        }
    )
    for _ in range(4):
        connection = http.client.HTTPConnection(address.netloc, timeout=60)
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        if stream:
            assert connection.getresponse().readline().startswith(b"data: ")
        assert added.acquire(timeout=20)
        connection.close()
        assert aborted.acquire(timeout=20)
    assert len(progress) == 4
    assert max(progress) < 1400


def test_the_embedded_model_serves_its_profile(engine: Engine) -> None:
    names = {group.name: len(group.members) for group in engine.groups}
    heads = engine.model.geometry.num_layers * engine.model.geometry.num_kv_heads
    assert names["streaming"] * 2 >= heads
    assert sum(names.values()) == heads
