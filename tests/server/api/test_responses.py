"""Responses over HTTP: what goes to the engine, and what comes back."""

import json

import pytest

from headlong.server.errors import EngineDeadError, QueueFullError

PATH = "/v1/responses"
TEMPLATE = (
    "{%- if tools %}{{- '<tools>' + (tools | map(attribute='function.name') | join(',')) + '</>' }}"
    "{%- endif %}{%- for message in messages %}{{- '<' + message.role + '>' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>' + call.function.name + (call.function.arguments | tojson) }}{%- endfor %}"
    "{{- '</>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<assistant>' + (tone or '') }}{%- endif %}"
)
SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}}}
TOOLS = [{"type": "function", "name": name, "parameters": SCHEMA} for name in ("look", "find")]
CALL = ["<tool", '_call>{"name": "look", "argu', 'ments": {"q": "a', 'b"}}</tool', "_call>"]


@pytest.fixture(autouse=True)
def template(engine):
    engine.tokenizer.chat_template = TEMPLATE
    engine.max_model_len = 4096


@pytest.fixture
def ask(client):
    def send(**fields):
        return client.post(PATH, json={"model": "alias", "input": "hi", **fields})

    return send


@pytest.fixture
def stream(ask):
    """Streams a response, and checks what every stream keeps to."""

    def read(**fields):
        response = ask(stream=True, **fields)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = response.text.split("\n\n")
        assert blocks.pop() == ""
        events = []
        for block in blocks:
            name, data = block.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        return events

    return read


def prompts(engine):
    return [engine.tokenizer.decode(ids) for ids, _ in engine.seen]


def anonymous(response):
    """A response without what differs from one to the next."""
    items = [{**item, "id": "", "call_id": ""} for item in response["output"]]
    return {**response, "id": "", "created_at": 0, "completed_at": 0, "output": items}


def test_a_response(ask, engine):
    engine.cached = 4
    body = ask(metadata={"a": "b"}, user="u", top_p=0.5, max_output_tokens=9).json()
    assert body["id"].startswith("resp_")
    assert body["object"] == "response"
    assert body["status"] == "completed"
    assert body["model"] == "alias"
    [item] = body["output"]
    assert item.pop("id").startswith("msg_")
    assert item == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [
            {"type": "output_text", "text": "Hello wörld", "annotations": [], "logprobs": []}
        ],
    }
    assert prompts(engine) == ["<user>hi</><assistant>"]
    num_tokens = len(engine.seen[0][0])
    assert body["usage"] == {
        "input_tokens": num_tokens,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": num_tokens - 4},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_tokens + 4,
        "kv_cache": {"peak_bytes": 100, "full_bytes": 300},
    }
    told = {name: body[name] for name in ("metadata", "user", "top_p", "max_output_tokens")}
    assert told == {"metadata": {"a": "b"}, "user": "u", "top_p": 0.5, "max_output_tokens": 9}
    assert body["temperature"] == 0.5, "the model's own default"
    assert body["text"] == {"format": {"type": "text"}}
    assert (body["tools"], body["tool_choice"], body["parallel_tool_calls"]) == ([], "auto", True)
    assert body["store"] is False
    assert body["completed_at"] >= body["created_at"]
    nothing = ("error", "incomplete_details", "instructions", "previous_response_id", "reasoning")
    assert all(body[name] is None for name in nothing)
    assert engine.requests[0].request_id.startswith(body["id"])


def test_a_response_that_is_cut_off(ask, stream):
    body = ask(max_output_tokens=2).json()
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["completed_at"] is None
    [item] = body["output"]
    assert item["status"] == "incomplete"
    assert item["content"][0]["text"] == "Hello"
    last = stream(max_output_tokens=2)[-1]
    assert last["type"] == "response.incomplete"
    assert anonymous(last["response"]) == anonymous({**body, "completed_at": None})


def test_a_stream(stream):
    events = stream()
    names = [event["type"].removeprefix("response.") for event in events]
    assert names == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 4,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    created, last = events[0]["response"], events[-1]["response"]
    assert created == events[1]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert created["id"] == last["id"]
    assert events[2]["item"]["content"] == []
    assert events[2]["item"]["status"] == "in_progress"
    assert events[3]["part"]["text"] == ""
    assert "".join(event["delta"] for event in events[4:8]) == "Hello wörld"
    assert events[8]["text"] == events[9]["part"]["text"] == "Hello wörld"
    [item] = last["output"]
    assert events[10]["item"] == item
    inside = events[3:10]
    assert {(event["item_id"], event["output_index"]) for event in inside} == {(item["id"], 0)}
    assert {event["content_index"] for event in inside} == {0}


def test_separators_do_not_break_an_event(stream, engine):
    engine.pieces = ["a\u2028b", "\x85"]
    assert stream()[-1]["response"]["output"][0]["content"][0]["text"] == "a\u2028b\x85"


@pytest.mark.parametrize(
    "pieces",
    [
        [""],
        ["Well. ", *CALL],
        [*CALL, *(piece.replace("look", "find") for piece in CALL), "\n", "So."],
        CALL[:3],
        ["".join(CALL)],
    ],
)
def test_a_stream_comes_to_the_whole_response(ask, stream, engine, pieces):
    engine.pieces = pieces
    fields = {"tools": TOOLS, "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    whole = ask(**fields).json()
    events = stream(**fields)
    last = events[-1]["response"]
    assert anonymous(last) == anonymous(whole)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == last["output"]
    for index, item in enumerate(last["output"]):
        own = [event for event in events if event.get("output_index") == index]
        deltas = [event for event in own if event["type"].endswith(".delta")]
        text = "".join(event["delta"] for event in deltas)
        if item["type"] == "message":
            [part] = item["content"]
            assert text == part["text"]
            assert [each for event in deltas for each in event["logprobs"]] == part["logprobs"]
        else:
            assert text == item["arguments"]


def test_calls(ask, engine):
    engine.pieces = ["Well. ", *CALL, *(piece.replace("look", "find") for piece in CALL)]
    message, look, find = ask(tools=TOOLS).json()["output"]
    assert message["content"][0]["text"].strip() == "Well."
    assert (look["type"], look["name"], look["status"]) == ("function_call", "look", "completed")
    assert json.loads(look["arguments"]) == {"q": "ab"}
    assert find["name"] == "find"
    assert look["id"].startswith("fc_")
    assert len({look["id"], find["id"], look["call_id"], find["call_id"]}) == 4
    assert prompts(engine) == ["<tools>look,find</><user>hi</><assistant>"]


def test_streamed_arguments(stream, engine):
    engine.pieces = CALL
    events = stream(tools=TOOLS)
    names = [event["type"].removeprefix("response.") for event in events]
    deltas = names.count("function_call_arguments.delta")
    assert deltas > 1, "arguments come as they are written"
    assert names[2:-1] == [
        "output_item.added",
        *["function_call_arguments.delta"] * deltas,
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert events[2]["item"]["arguments"] == ""
    assert json.loads(events[-3]["arguments"]) == {"q": "ab"}


def test_a_call_that_is_cut_off(ask, engine):
    engine.pieces = CALL
    body = ask(tools=TOOLS, max_output_tokens=3).json()
    assert body["status"] == "incomplete"
    assert [item["status"] for item in body["output"]] == ["incomplete"]


def test_a_call_that_is_cut_off_before_its_name_was_told(ask, engine):
    engine.pieces = ["Well.", '\n<tool_call>\n{"name": "lo', "never"]
    body = ask(tools=TOOLS, max_output_tokens=2).json()
    assert body["status"] == "incomplete"
    [message] = body["output"]
    assert [part["text"] for part in message["content"]] == ["Well."]


def test_what_is_echoed(ask):
    form = {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}
    assert ask(text={"format": form}).json()["text"] == {"format": form}
    choice = {"type": "function", "name": "find"}
    body = ask(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, instructions="i").json()
    assert body["tools"] == [{**tool, "description": None, "strict": False} for tool in TOOLS]
    assert body["tool_choice"] == choice
    assert body["parallel_tool_calls"] is False
    assert body["instructions"] == "i"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "find"}])
def test_calls_that_must_be_made_have_a_grammar(ask, engine, choice):
    assert ask(tools=TOOLS, tool_choice=choice).status_code == 200
    assert engine.seen[0][1].structure.kind == "grammar"


def test_the_form_of_the_text(ask, engine):
    form = {"type": "json_schema", "name": "answer", "schema": SCHEMA}
    for fields in ({"text": {"format": form}}, {"text": {"format": {"type": "json_object"}}}):
        assert ask(**fields).status_code == 200
    assert ask(regex="a+", text={"format": {"type": "text"}, "verbosity": "medium"}).is_success
    structures = [params.structure for _, params in engine.seen]
    assert [each.kind for each in structures] == ["json_schema", "json_object", "regex"]
    assert json.loads(structures[0].text) == SCHEMA
    assert [each.param for each in structures] == ["text.format", "text.format", "regex"]


def test_a_form_and_tools_exclude_each_other(ask, engine):
    response = ask(tools=TOOLS, text={"format": {"type": "json_object"}})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "text.format"
    assert not engine.admitted


def test_a_form_that_the_engine_refuses(ask, engine):
    engine.failure, engine.failure_code = "this schema is not supported", "invalid_structure"
    for more in ({}, {"stream": True}):
        response = ask(text={"format": {"type": "json_object"}}, **more)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "text.format"


def test_extensions_reach_the_engine(ask, engine):
    body = ask(
        kv_policy={"sink_size": 4, "window_size": 32},
        cache_salt="s",
        priority=3,
        timeout=5,
        top_k=2,
        seed=7,
        stop=["x"],
        min_tokens=1,
        cache_report=True,
        return_token_ids=True,
        chat_template_kwargs={"tone": "soft"},
    ).json()
    [request] = engine.requests
    assert (request.kv_policy.sink_size, request.kv_policy.window_size) == (4, 32)
    assert (request.cache_salt, request.priority, request.timeout_s) == ("s", 3, 5)
    params = request.params
    assert (params.top_k, params.seed, params.stop, params.min_tokens) == (2, 7, ("x",), 1)
    assert body["usage"]["cache_misses"] == {}
    assert body["prompt_token_ids"] == engine.seen[0][0]
    assert len(body["token_ids"]) == 4
    assert prompts(engine) == ["<user>hi</><assistant>soft"]


def test_a_response_without_a_limit_may_fill_the_context(ask, engine):
    ask()
    ask(max_output_tokens=3)
    whole, limited = (params.max_tokens for _, params in engine.seen)
    assert whole == 4096 - len(engine.seen[0][0])
    assert limited == 3
    assert [request.asked_max_tokens for request in engine.requests] == [False, True]


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, None),
        ({"top_logprobs": 0}, None),
        ({"include": ["reasoning.encrypted_content"]}, None),
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"top_logprobs": 2}, 2),
        ({"top_logprobs": 1, "include": ["message.output_text.logprobs"]}, 1),
    ],
)
def test_log_probabilities(ask, engine, fields, count):
    body = ask(**fields).json()
    assert engine.seen[0][1].logprobs == count
    entries = body["output"][0]["content"][0]["logprobs"]
    assert len(entries) == (0 if count is None else 4)
    assert body["top_logprobs"] == (count or 0)
    if count == 2:
        assert entries[0]["token"] == "Hel"
        assert entries[0]["bytes"] == list(b"Hel")
        assert entries[0]["top_logprobs"][1] == {"token": "\ufffd", "logprob": -9999, "bytes": []}


def test_log_probabilities_of_the_text_alone(ask, engine):
    engine.pieces = ["Well.", *CALL]
    message, _ = ask(tools=TOOLS, top_logprobs=1).json()["output"]
    assert [entry["token"] for entry in message["content"][0]["logprobs"]] == ["Well."]


def test_a_failure_inside_a_stream(stream, engine):
    engine.failure, engine.fail_at = EngineDeadError("the engine stopped"), 2
    *_, delta, error, failed = stream()
    assert delta["type"] == "response.output_text.delta"
    assert error["type"] == "error"
    assert error["code"] == error["error"]["code"] == "engine_dead"
    assert error["message"] == error["error"]["message"] == "the engine stopped"
    assert failed["type"] == "response.failed"
    response = failed["response"]
    assert response["status"] == "failed"
    assert response["error"] == {"code": "server_error", "message": "the engine stopped"}
    [item] = response["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "Hello")
    assert response["usage"]["output_tokens"] == 2


def test_a_failure_of_which_nothing_may_be_told(stream, engine, caplog):
    engine.failure, engine.fail_at = RuntimeError("secret"), 2
    events = stream()
    assert events[-1]["response"]["error"]["message"] == "internal error"
    assert events[-2]["code"] == "internal_error"
    assert "secret" not in json.dumps(events)
    assert "secret" in caplog.text


def test_the_deadline(ask, stream, engine):
    engine.failure, engine.fail_at = "its time is over", 2
    engine.failure_code = "deadline_exceeded"
    assert ask().status_code == 504
    assert stream()[-2]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("streaming", [True, False])
def test_failures_before_the_first_event_are_responses(ask, engine, streaming):
    engine.refusal = QueueFullError("try later", 3)
    response = ask(stream=streaming)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    engine.refusal, engine.failure = None, EngineDeadError("gone")
    assert ask(stream=streaming).status_code == 503


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "resp_1"),
        ("DELETE", "resp_1"),
        ("POST", "resp_1/cancel"),
        ("GET", "resp_1/input_items"),
    ],
)
def test_nothing_is_stored(client, method, path):
    response = client.request(method, f"{PATH}/{path}")
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "response_not_found"
    assert "resp_1" in error["message"]


def test_openapi(client):
    spec = client.get("/openapi.json").json()
    operation = spec["paths"][PATH]["post"]
    errors = {"400", "401", "404", "408", "413", "415", "429", "500", "503", "504"}
    assert set(operation["responses"]) == {"200"} | errors
    content = operation["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
    fields = spec["components"]["schemas"]["ResponsesRequest"]["properties"]
    assert {"input", "kv_policy", "text", "chat_template_kwargs"} <= set(fields)
    assert not {"n", "max_tokens", "messages", "response_format"} & set(fields)
