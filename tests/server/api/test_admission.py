"""A request takes its places in the queue before any work is done for it, and gives them back."""

import asyncio
import json

import pytest

from headlong.server.app import create_app
from headlong.server.errors import EngineDeadError, InvalidRequestError, QueueFullError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
PATHS = [COMPLETIONS, CHAT]


@pytest.fixture
def untouched(engine, monkeypatch):
    """Fails if anything is tokenized or rendered."""

    def touch(*_, **__):
        raise AssertionError("work was done before the request was admitted")

    monkeypatch.setattr(type(engine.tokenizer), "__call__", touch)
    monkeypatch.setattr(type(engine.tokenizer), "apply_chat_template", touch)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_full_queue_says_when_to_come_back(post, engine, path, stream):
    engine.refusal = QueueFullError("8 requests wait", retry_after_s=7)
    response = post(path, stream=stream)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("path", PATHS)
def test_a_server_that_drains(post, engine, path):
    engine.is_draining = True
    response = post(path)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "draining"


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("path", PATHS)
def test_a_dead_engine_does_not_say_when(post, engine, path):
    engine.is_alive = False
    response = post(path)
    assert response.status_code == 503
    assert "retry-after" not in response.headers
    assert response.json()["error"]["code"] == "engine_dead"


@pytest.mark.parametrize(
    ("path", "fields", "count"),
    [
        (COMPLETIONS, {"prompt": "a"}, 1),
        (COMPLETIONS, {"prompt": [5, 6, 7]}, 1),
        (COMPLETIONS, {"prompt": ["a", "b", "c"], "n": 2}, 3),
        (COMPLETIONS, {"prompt": [[5], [6]]}, 2),
        (CHAT, {"n": 4}, 1),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_prompt_takes_a_place(post, engine, path, fields, count, stream):
    assert post(path, stream=stream, **fields).status_code == 200
    assert engine.admitted == [count]
    assert engine.num_places == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"prompt": ["a", "b" * 99]}),
        (COMPLETIONS, {"prompt": [[5], [10**6]]}),
        (COMPLETIONS, {"stop_token_ids": [10**6]}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 99}]}),
        (CHAT, {"chat_template_kwargs": {"tone": 3}}),
        (CHAT, {"chat_template_kwargs": {"messages": 3}}),
    ],
)
def test_a_prompt_that_cannot_be_encoded_gives_its_places_back(post, engine, path, fields, stream):
    assert post(path, stream=stream, **fields).status_code == 400
    assert engine.admitted
    assert engine.num_places == 0
    assert not engine.requests


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fail_at", [0, 2])
@pytest.mark.parametrize("failure", [InvalidRequestError("no"), EngineDeadError("x"), "aborted"])
def test_a_request_that_fails_gives_its_places_back(post, engine, failure, fail_at, stream):
    engine.failure, engine.fail_at = failure, fail_at
    post(COMPLETIONS, prompt=["a", "b", "c"], n=2, stream=stream)
    assert engine.num_places == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_an_engine_that_dies_after_it_admitted(post, engine, path, stream):
    admit = engine.admit

    def admit_and_die(count):
        ticket = admit(count)
        engine.is_alive = False
        return ticket

    engine.admit = admit_and_die
    assert post(path, stream=stream).status_code == 503
    assert engine.num_places == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("after", [0, 1, 3, 10])
def test_a_client_that_leaves_gives_its_places_back(engine, config, path, stream, after):
    """The client goes when the event loop has turned `after` times."""
    app = create_app(engine, config)
    engine.hang_at = 1
    body = {"model": "alias", "stream": stream, "n": 2}
    body |= (
        {"prompt": ["a", "b"]}
        if path == COMPLETIONS
        else {"messages": [{"role": "user", "content": "a"}]}
    )

    async def main():
        messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive():
            if messages:
                return messages.pop()
            for _ in range(after):
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        await engine.start()
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [(b"content-type", b"application/json")],
            "query_string": b"",
        }
        await asyncio.wait_for(app(scope, receive, send), 20)

    asyncio.run(main())
    assert engine.admitted
    assert engine.num_places == 0
    assert not engine.running
