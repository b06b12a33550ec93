import pytest

from headlong.server.api.unsupported import CHAT_FIELDS, COMPLETION_FIELDS
from headlong.server.errors import ContextLengthError, EngineDeadError, InvalidRequestError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 3}, "model"),
        ({"model": None}, "model"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [""]}, "prompt.0"),
        ({"prompt": [[]]}, "prompt.0"),
        ({"prompt": ["a", 1]}, "prompt.1"),
        ({"prompt": [1, "a"]}, "prompt.1"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt.0"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": [261]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.0}, "max_tokens"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": "x" * 1025}, "stop"),
        ({"stop": ["a", "x" * 1025]}, "stop.1"),
        ({"stop_token_ids": [261]}, "stop_token_ids"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"261": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1_0": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias.1"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"user": 5}, "user"),
    ],
)
def test_bad_values_are_refused_by_name(post, engine, fields, param, stream):
    response = post(COMPLETIONS, **{"stream": stream, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert not engine.seen


def test_stream_options_need_a_stream(post):
    error = post(COMPLETIONS, stream_options={}).json()["error"]
    assert error["param"] == "stream_options"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_unknown_models(post, path):
    response = post(path, model="x" * 100_000)
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert len(response.content) < 1000


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_every_served_name_works(post, path):
    assert post(path, model="alias").json()["model"] == "alias"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a" * 64},
        {"prompt": [1] * 64},
        {"prompt": ["a", "a" * 100_000]},
        {"prompt": "a" * 60, "max_tokens": 5},
        {"max_tokens": 10**4000},
    ],
)
def test_what_does_not_fit_the_context(post, engine, fields):
    response = post(COMPLETIONS, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"
    assert "64 tokens" in error["message"]
    assert len(error["message"]) < 500
    assert not engine.seen


UNSUPPORTED = {
    COMPLETIONS: {
        "best_of": 2,
        "suffix": "x",
        "prompt_logprobs": 0,
        "bad_words": ["x"],
        "guided_json": {},
        "tools": [{"type": "function"}],
        "tool_choice": "required",
        "use_beam_search": True,
        "logits_processors": ["x"],
    },
    CHAT: {
        "best_of": 2,
        "functions": [{}],
        "function_call": "auto",
        "modalities": ["text", "audio"],
        "audio": {"voice": "x"},
        "prediction": {},
        "reasoning_effort": "high",
        "store": True,
        "web_search_options": {},
        "chat_template": "{{ 1 }}",
        "echo": True,
    },
}


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, names in UNSUPPORTED.items() for name in names]
)
def test_known_parameters_that_are_not_supported(post, engine, path, name):
    response = post(path, **{name: UNSUPPORTED[path][name]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name
    assert "not supported" in response.json()["error"]["message"]
    assert not engine.seen


def test_true_is_not_one(post):
    assert post(COMPLETIONS, n=True).status_code == 400


@pytest.mark.parametrize(("path", "table"), [(COMPLETIONS, COMPLETION_FIELDS), (CHAT, CHAT_FIELDS)])
def test_values_that_ask_for_nothing_are_tolerated(post, path, table):
    assert post(path, **dict.fromkeys(table)).status_code == 200
    neutral = {name: values[0] for name, values in table.items() if values}
    assert post(path, **neutral).status_code == 200


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_fields_that_no_one_knows_are_tolerated(post, path):
    fields = {"wibble": {"a": [1]}, "user": "me", "metadata": {"a": "b"}}
    assert post(path, **fields).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (ContextLengthError("too long", "prompt"), 400, "context_length_exceeded"),
        (InvalidRequestError("no", "prompt"), 400, None),
        (EngineDeadError("dead"), 503, "engine_dead"),
        (RuntimeError("secret"), 500, None),
        ("out of blocks", 500, "request_aborted"),
    ],
)
def test_what_the_engine_refuses_at_first(post, engine, failure, status, code, stream):
    engine.failure = failure
    response = post(COMPLETIONS, stream=stream)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error["code"] == code
    assert "secret" not in response.text
    assert "Traceback" not in response.text


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (EngineDeadError("the engine stopped"), "the engine stopped"),
        ("out of blocks", "out of blocks"),
        (RuntimeError("secret"), "internal error"),
    ],
)
def test_an_error_inside_a_stream_is_an_event_and_the_end(
    post, engine, events, path, failure, message
):
    engine.failure, engine.fail_at = failure, 2
    response = post(path, stream=True)
    assert response.status_code == 200
    *chunks, last = events(response.text)
    assert chunks
    assert last["error"]["message"] == message
    assert "secret" not in response.text


def test_one_failed_prompt_stops_the_others(post, engine):
    engine.failure, engine.fail_at = InvalidRequestError("no"), 2
    assert post(COMPLETIONS, prompt=["a", "b", "c"]).status_code == 400
    assert not engine.running


def test_a_dead_engine(client, post, engine):
    engine.is_alive = False
    assert post(COMPLETIONS).status_code == 503
    response = client.get("/health")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_dead"
