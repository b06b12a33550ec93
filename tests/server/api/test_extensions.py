"""The fields that say how a request is run: each reaches the engine or is refused by name."""

import time
from itertools import chain

import pytest
from starlette.testclient import TestClient

from headlong.server.app import create_app
from headlong.server.config import ServerConfig
from headlong.server.engine.request import KVPolicy

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
PATHS = [COMPLETIONS, CHAT]


@pytest.mark.parametrize("path", PATHS)
def test_what_a_request_has_unless_it_says_more(post, engine, path):
    before = time.monotonic()
    assert post(path).status_code == 200
    [request] = engine.requests
    assert (request.n, request.priority, request.tenant, request.cache_salt) == (1, 0, "", "")
    assert request.kv_policy is None
    assert request.timeout_s is None
    assert request.asked_max_tokens is False
    assert before <= request.arrived <= time.monotonic()


@pytest.mark.parametrize("path", PATHS)
def test_every_extension_reaches_the_engine(post, engine, path):
    response = post(
        path,
        n=3,
        priority=-5,
        cache_salt="s" * 256,
        timeout=2.5,
        kv_policy={"sink_size": 8, "window_size": 32},
        max_tokens=2,
        user="someone",
        best_of=3,
    )
    assert response.status_code == 200, response.text
    [request] = engine.requests
    assert (request.n, request.priority, request.cache_salt) == (3, -5, "s" * 256)
    assert request.kv_policy == KVPolicy(sink_size=8, window_size=32)
    assert request.timeout_s == 2.5
    assert request.asked_max_tokens is True


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("full", KVPolicy(full=True)),
        ({"window_size": 1}, KVPolicy(window_size=1)),
        ({"sink_size": 0}, KVPolicy(sink_size=0)),
        ({"sink_size": None, "window_size": 5}, KVPolicy(window_size=5)),
        (None, None),
    ],
)
def test_kv_policies(post, engine, path, given, expected):
    assert post(path, kv_policy=given).status_code == 200
    assert engine.requests[0].kv_policy == expected


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"priority": 2**31}, "priority"),
        ({"priority": 1.0}, "priority"),
        ({"cache_salt": "s" * 257}, "cache_salt"),
        ({"cache_salt": 5}, "cache_salt"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": 86_401}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"kv_policy": "half"}, "kv_policy"),
        ({"kv_policy": 5}, "kv_policy"),
        ({"kv_policy": []}, "kv_policy"),
        ({"kv_policy": True}, "kv_policy"),
        ({"kv_policy": {"window_size": 0}}, "kv_policy.window_size"),
        ({"kv_policy": {"sink_size": -1}}, "kv_policy.sink_size"),
        ({"kv_policy": {"sink_size": 2**31}}, "kv_policy.sink_size"),
        ({"kv_policy": {"sinks": 4}}, "kv_policy.sinks"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": "5"}, "truncate_prompt_tokens"),
        ({"truncation_side": "right"}, "truncation_side"),
        ({"cache_report": 1}, "cache_report"),
        ({"return_token_ids": "yes"}, "return_token_ids"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(post, engine, path, fields, param):
    response = post(path, **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert not engine.requests
    assert not engine.admitted


def test_completions_of_all_prompts_are_bounded(post, engine):
    response = post(COMPLETIONS, prompt=["a"] * 200, n=6)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "n"
    assert not engine.admitted


@pytest.mark.parametrize(
    ("limit", "asked", "expected"),
    [(None, 3.0, 3.0), (10.0, None, 10.0), (10.0, 3.0, 3.0), (10.0, 60.0, 10.0)],
)
def test_the_servers_timeout_is_default_and_cap(engine, limit, asked, expected):
    config = ServerConfig(served_model_name=("m",), request_timeout=limit)
    with TestClient(create_app(engine, config)) as client:
        body = {"model": "m", "prompt": "a", "timeout": asked}
        assert client.post(COMPLETIONS, json=body).status_code == 200
    assert engine.requests[0].timeout_s == expected


def test_the_tenant_is_who_the_key_belongs_to(engine, config):
    app = create_app(engine, config)

    async def with_tenant(scope, receive, send):
        if scope["type"] == "http":
            scope.setdefault("state", {})["tenant"] = "team-a"
        await app(scope, receive, send)

    with TestClient(with_tenant) as client:
        # A client's own field of that name is one that nobody knows.
        body = {"model": "alias", "prompt": ["a", "b"], "tenant": "team-b"}
        assert client.post(COMPLETIONS, json=body).status_code == 200
    assert [request.tenant for request in engine.requests] == ["team-a"] * 2


@pytest.mark.parametrize("path", PATHS)
def test_choices_of_n_completions(post, engine, path):
    engine.pieces = engine.pieces[:2]
    body = post(path, n=3).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 6
    assert len(engine.requests) == 1


def test_choices_of_a_prompt_lie_together(post, engine):
    body = post(COMPLETIONS, prompt=["ab", "c"], n=2, return_token_ids=True).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    lengths = [len(choice["prompt_token_ids"]) for choice in body["choices"]]
    assert lengths == [2, 2, 1, 1]
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 16
    assert engine.admitted == [2]


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_of_n_completions(post, events, path):
    *chunks, _ = events(post(path, n=2, stream=True).text)
    texts, reasons = ["", ""], [[], []]
    for chunk in chunks:
        [choice] = chunk["choices"]
        text = choice["text"] if path == COMPLETIONS else choice["delta"].get("content", "")
        texts[choice["index"]] += text
        if choice["finish_reason"]:
            reasons[choice["index"]].append(choice["finish_reason"])
    assert texts == ["Hello wörld"] * 2
    assert reasons == [["stop"]] * 2
    if path == CHAT:
        roles = [
            chunk["choices"][0]["index"]
            for chunk in chunks
            if chunk["choices"][0]["delta"].get("role") == "assistant"
        ]
        assert roles == [0, 1]


@pytest.mark.parametrize(
    ("prompt", "count", "expected"),
    [
        ("abcdef", 3, ["def"]),
        ("abc", 3, ["abc"]),
        ("abc", 50, ["abc"]),
        (["abcd", "e"], 2, ["cd", "e"]),
        # The context is 64 tokens.
        ("a" * 40 + "b" * 60, -1, ["a" * 3 + "b" * 60]),
        ("x" * 100_000 + "tail", 4, ["tail"]),
    ],
)
def test_a_truncated_prompt_keeps_its_last_tokens(post, engine, prompt, count, expected):
    response = post(COMPLETIONS, prompt=prompt, truncate_prompt_tokens=count)
    assert response.status_code == 200, response.text
    assert [engine.tokenizer.decode(ids) for ids, _ in engine.seen] == expected


def test_truncation_leaves_room_for_what_is_asked(post, engine):
    post(COMPLETIONS, prompt=[5] * 99, truncate_prompt_tokens=-1, max_tokens=10)
    post(CHAT, messages=[{"role": "user", "content": "x" * 99}], truncate_prompt_tokens=-1)
    assert [len(ids) for ids, _ in engine.seen] == [54, 63]


def test_a_prompt_that_is_too_long_after_truncation(post):
    error = post(COMPLETIONS, prompt=[5] * 99, truncate_prompt_tokens=70).json()["error"]
    assert error["code"] == "context_length_exceeded"


def test_token_ids_of_a_completion(post, events):
    [choice] = post(COMPLETIONS, prompt="ab", return_token_ids=True).json()["choices"]
    assert choice["token_ids"] == [257, 258, 259, 260]
    assert len(choice["prompt_token_ids"]) == 2
    *chunks, _ = events(post(COMPLETIONS, prompt="ab", return_token_ids=True, stream=True).text)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["prompt_token_ids"] == choice["prompt_token_ids"]
    assert not any("prompt_token_ids" in each for each in choices[1:])
    assert [token for each in choices for token in each["token_ids"]] == choice["token_ids"]


def test_token_ids_of_an_answer(post, events, engine):
    engine.pieces = ["Hel", "", "lo"]
    body = post(CHAT, return_token_ids=True).json()
    assert body["prompt_token_ids"] == engine.seen[0][0]
    assert body["choices"][0]["token_ids"] == [257, 2, 258]
    *chunks, _ = events(post(CHAT, return_token_ids=True, stream=True).text)
    assert chunks[0]["prompt_token_ids"] == body["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    tokens = [chunk["choices"][0].get("token_ids") or [] for chunk in chunks]
    assert list(chain.from_iterable(tokens)) == [257, 2, 258]


@pytest.mark.parametrize("path", PATHS)
def test_no_token_ids_unless_asked(post, path):
    assert "token_ids" not in post(path).text


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"regex": "[a-z]+"}, "regex"),
        ({"grammar": 'start: "a"'}, "grammar"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "regex"),
    ],
)
def test_the_form_of_a_completion_reaches_the_engine(post, engine, path, fields, kind):
    assert post(path, **fields).status_code == 200
    assert engine.seen[0][1].structure.kind == kind


@pytest.mark.parametrize("path", PATHS)
def test_a_request_has_one_form(post, engine, path):
    response = post(path, regex="a", response_format={"type": "json_object"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "regex"
    assert not engine.admitted


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status", "param"),
    [
        ("deadline_exceeded", 504, "timeout"),
        ("invalid_structure", 400, "regex"),
        ("request_aborted", 500, None),
        (None, 500, None),
    ],
)
def test_what_the_engine_gives_up(post, engine, path, stream, code, status, param):
    engine.failure, engine.failure_code = "too bad", code
    response = post(path, regex="a", stream=stream)
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["message"], error["param"]) == ("too bad", param)


@pytest.mark.parametrize("path", PATHS)
def test_one_completion_given_up_is_all_given_up(post, engine, path):
    engine.failure, engine.fail_at = "too bad", 2
    assert post(path, n=3).status_code == 500
    assert not engine.running
