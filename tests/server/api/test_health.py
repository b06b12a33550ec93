import pytest

from headlong.server.api.prompts import PromptEncoder
from headlong.server.errors import QueueFullError


@pytest.mark.parametrize(
    ("alive", "draining", "health", "ready", "code"),
    [
        (True, False, 200, 200, None),
        (True, True, 200, 503, "draining"),
        (False, False, 503, 503, "engine_dead"),
    ],
)
def test_orchestrators_learn_whether_to_wait_or_to_restart(
    client, engine, alive, draining, health, ready, code
):
    engine.is_alive, engine.is_draining = alive, draining
    assert client.get("/health").status_code == health
    answer = client.get("/ready")
    assert answer.status_code == ready
    if code is None:
        assert answer.json() == {"status": "ready"}
    else:
        assert answer.json()["error"]["code"] == code


def test_health_without_a_body(client, engine):
    response = client.head("/health")
    assert (response.status_code, response.content) == (200, b"")
    engine.is_alive = False
    assert client.head("/health").status_code == 503


@pytest.mark.parametrize(
    ("path", "encoder"),
    [("/v1/completions", "completion_prompts"), ("/v1/chat/completions", "chat_prompt")],
)
def test_a_request_is_admitted_before_it_is_tokenized(post, engine, monkeypatch, path, encoder):
    encode = getattr(PromptEncoder, encoder)
    encoded = []

    async def count(*args):
        encoded.append(args)
        return await encode(*args)

    monkeypatch.setattr(PromptEncoder, encoder, count)
    assert post(path).status_code == 200
    assert len(encoded) == 1
    engine.refusal = QueueFullError("full", 17)
    answer = post(path)
    assert answer.status_code == 429
    assert answer.headers["Retry-After"] == "17"
    assert len(encoded) == 1
