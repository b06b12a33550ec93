"""What requests may ask for, over HTTP on the embedded model with its compressed cache."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from headlong.demo.paths import MODEL_DIR
from headlong.server.app import create_app
from headlong.server.async_engine import AsyncEngine
from headlong.server.config import ServerConfig
from support.engines import build_engine

TEXT = "The archive keeps its letters by year, and every year has a drawer of its own. "
GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    engine = build_engine(
        MODEL_DIR,
        profile=str(MODEL_DIR / "profile.json"),
        kv_cache_memory_bytes=64 << 20,
        max_model_len=2048,
        max_num_batched_tokens=512,
    )
    config = ServerConfig(served_model_name=("demo",))
    with TestClient(create_app(AsyncEngine(engine), config)) as test_client:
        yield test_client
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)
    engine.cache.check_integrity()


def ask(client: TestClient, path: str, **fields: Any) -> Any:
    response = client.post(path, json={**GREEDY, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_scored_text_has_the_log_probabilities_it_was_written_with(client: TestClient) -> None:
    written = ask(
        client,
        "/v1/completions",
        prompt=TEXT * 20,
        max_tokens=12,
        logprobs=1,
        return_token_ids=True,
    )["choices"][0]
    whole = written["prompt_token_ids"] + written["token_ids"]
    [scored] = ask(client, "/v1/completions", prompt=[whole], max_tokens=0, logprobs=1, echo=True)[
        "choices"
    ]
    assert len(scored["logprobs"]["tokens"]) == len(whole)
    scores = scored["logprobs"]["token_logprobs"]
    assert scores[0] is None
    assert scores[-12:] == pytest.approx(written["logprobs"]["token_logprobs"], abs=1e-3)
    for token, score, top in zip(
        scored["logprobs"]["tokens"][1:],
        scores[1:],
        scored["logprobs"]["top_logprobs"][1:],
        strict=True,
    ):
        assert top[token] == score
    assert scored["text"] == TEXT * 20 + written["text"]
    starts = scored["logprobs"]["text_offset"]
    assert starts == sorted(starts)
    assert starts[-12] == len(TEXT * 20)


def test_lm_evals_batch(client: TestClient) -> None:
    prompts = [
        client.post("/tokenize", json={"prompt": TEXT * count}).json()["tokens"]
        for count in (1, 5, 9)
    ]
    body = ask(
        client, "/v1/completions", prompt=prompts, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    for prompt, choice in zip(prompts, body["choices"], strict=True):
        counts = {len(entries) for entries in choice["logprobs"].values()}
        assert counts == {len(prompt) + 1}
    # Scored alone a text scores the same.
    [alone] = ask(
        client, "/v1/completions", prompt=prompts[1], max_tokens=1, logprobs=1, echo=True
    )["choices"]
    together = body["choices"][1]["logprobs"]["token_logprobs"]
    assert together[1:] == pytest.approx(alone["logprobs"]["token_logprobs"][1:], abs=1e-3)


def test_completions_of_one_prompt(client: TestClient) -> None:
    body = ask(client, "/v1/completions", prompt=TEXT, n=4, max_tokens=8)
    assert len({choice["text"] for choice in body["choices"]}) == 1
    assert body["usage"]["completion_tokens"] == 32
    sampled = ask(
        client, "/v1/completions", prompt=TEXT, n=4, max_tokens=8, temperature=5.0, seed=3
    )
    assert len({choice["text"] for choice in sampled["choices"]}) > 1
    again = ask(client, "/v1/completions", prompt=TEXT, n=4, max_tokens=8, temperature=5.0, seed=3)
    assert again["choices"] == sampled["choices"]


def test_a_wider_cache_costs_more(client: TestClient) -> None:
    compressed = ask(client, "/v1/completions", prompt=TEXT * 40, max_tokens=4)["usage"]
    full = ask(client, "/v1/completions", prompt=TEXT * 40, max_tokens=4, kv_policy="full")["usage"]
    assert compressed["kv_cache"]["peak_bytes"] < full["kv_cache"]["peak_bytes"]
    assert compressed["kv_cache"]["full_bytes"] == full["kv_cache"]["full_bytes"]


def test_a_prefix_is_found_by_its_own_salt_alone(client: TestClient) -> None:
    prompt = "Of salt: " + TEXT * 20

    def cached(salt: str) -> tuple[int, dict[str, int]]:
        usage = ask(
            client,
            "/v1/completions",
            prompt=prompt,
            max_tokens=1,
            cache_salt=salt,
            cache_report=True,
        )["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"], usage["cache_misses"]

    assert cached("one")[0] == 0
    assert cached("one")[0] > 100
    found, misses = cached("two")
    assert found == 0
    assert "salt" not in misses


def test_json_is_json(client: TestClient) -> None:
    schema = {
        "type": "object",
        "properties": {"year": {"type": "integer"}},
        "required": ["year"],
        "additionalProperties": False,
    }
    [choice] = ask(
        client,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": TEXT}],
        max_tokens=200,
        ignore_eos=False,
        response_format={"type": "json_schema", "json_schema": {"name": "y", "schema": schema}},
    )["choices"]
    if choice["finish_reason"] == "stop":
        assert set(json.loads(choice["message"]["content"])) == {"year"}
    else:
        assert choice["message"]["content"].lstrip().startswith("{")


def test_a_form_that_cannot_be(client: TestClient) -> None:
    response = client.post(
        "/v1/completions", json={**GREEDY, "prompt": TEXT, "regex": "(unclosed", "max_tokens": 4}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "regex"
    assert ask(client, "/v1/completions", prompt=TEXT, max_tokens=2)["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline(client: TestClient, stream: bool) -> None:
    body = {**GREEDY, "prompt": TEXT * 5, "max_tokens": 500, "timeout": 1e-6, "stream": stream}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"


def test_a_truncated_prompt(client: TestClient) -> None:
    tokens = client.post("/tokenize", json={"prompt": TEXT}).json()["tokens"]
    [cut] = ask(
        client,
        "/v1/completions",
        prompt=TEXT * 300,
        truncate_prompt_tokens=len(tokens),
        max_tokens=4,
        return_token_ids=True,
    )["choices"]
    # The first one begins the text, and is a word after a space in the longer one.
    assert cut["prompt_token_ids"][1:] == tokens[1:]


def test_text_there_and_back(client: TestClient) -> None:
    tokens = client.post("/tokenize", json={"prompt": TEXT}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == TEXT
    info = client.get("/tokenizer_info").json()
    assert info["chat_template"]
    assert info["vocab_size"] > max(tokens)
