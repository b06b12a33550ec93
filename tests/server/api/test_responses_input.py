"""What the input of a response becomes, and what is refused by its name."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headlong.server.api.schemas_responses import ResponsesRequest
from headlong.server.api.schemas_responses_input import InputCall
from headlong.server.api.unsupported import RESPONSES_FIELDS

PATH = "/v1/responses"
TEMPLATE = (
    "{%- for message in messages %}{{- '<' + message.role + '>' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '|' + call.id + ':' + call.function.name + (call.function.arguments | tojson) }}"
    "{%- endfor %}{{- '>' + message.tool_call_id if message.tool_call_id }}{%- endfor %}"
)
FUNCTION = {"type": "function", "name": "look"}
USER = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"q": 1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "found"}
SAID = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "Well.", "annotations": [], "logprobs": []}],
}


@pytest.fixture(autouse=True)
def template(engine):
    engine.tokenizer.chat_template = TEMPLATE
    engine.max_model_len = 4096


@pytest.fixture
def ask(client):
    def send(**fields):
        return client.post(PATH, json={"model": "alias", "input": "hi", **fields})

    return send


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"input": "a"}, "<user>a"),
        ({"input": "a", "instructions": "i"}, "<system>i<user>a"),
        ({"input": [{"type": "message", **USER}]}, "<user>hi"),
        ({"input": [{"type": None, **USER}]}, "<user>hi"),
        ({"input": [{"role": "developer", "content": "d"}, USER]}, "<system>d<user>hi"),
        (
            {
                "input": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "input_text", "text": "a"},
                            {"type": "input_text", "text": "b"},
                        ],
                    }
                ]
            },
            "<user>a\nb",
        ),
        ({"input": [{"role": "user", "content": []}]}, "<user>"),
        ({"input": [USER, SAID, USER]}, "<user>hi<assistant>Well.<user>hi"),
        ({"input": [USER, CALL, OUTPUT]}, '<user>hi<assistant>|c1:look{"q": 1}<tool>found>c1'),
        (
            {"input": [SAID, CALL, {**CALL, "call_id": "c2", "arguments": ""}, OUTPUT]},
            '<assistant>Well.|c1:look{"q": 1}|c2:look{}<tool>found>c1',
        ),
        (
            {
                "input": [
                    {"type": "reasoning", "id": "rs_1", "summary": []},
                    CALL,
                    {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "x"},
                    {**CALL, "call_id": "c2"},
                    {**OUTPUT, "output": [{"type": "input_text", "text": "f"}]},
                    SAID,
                ]
            },
            '<assistant>|c1:look{"q": 1}|c2:look{"q": 1}<tool>f>c1<assistant>Well.',
        ),
    ],
)
def test_items_become_messages(ask, engine, fields, prompt):
    response = ask(**fields)
    assert response.status_code == 200, response.text
    assert engine.tokenizer.decode(engine.seen[0][0]) == prompt


def test_an_answer_can_be_sent_back_as_it_came(ask, engine):
    first = [{"role": "user", "content": "hi"}]
    output = ask(input=first).json()["output"]
    assert ask(input=[*first, *output, USER]).status_code == 200
    assert engine.tokenizer.decode(engine.seen[1][0]) == "<user>hi<assistant>Hello wörld<user>hi"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": None}, "input", "a string or a list of items"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"type": "reasoning"}]}, "input", "must have a message"),
        ({"input": ["a"]}, "input.0", "must be an object"),
        ({"input": [USER, {"type": "item_reference", "id": "msg_1"}]}, "input.1", "not stored"),
        ({"input": [{"type": "web_search_call"}]}, "input.0", "'web_search_call'"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input.0.role", "user"),
        ({"input": [{"role": "user"}]}, "input.0.content", "required"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0.type",
            "'input_image' is not supported",
        ),
        ({"input": [{**CALL, "arguments": "{"}]}, "input.0.arguments", "not valid JSON"),
        ({"input": [{**CALL, "arguments": "[]"}]}, "input.0.arguments", "JSON object"),
        ({"input": [USER, OUTPUT]}, "input.1.call_id", "'c1'; responses are not stored"),
        ({"input": [OUTPUT, CALL]}, "input.0.call_id", "no function_call"),
        ({"input": "a" * 5000}, "input", "context is"),
        ({"store": True}, "store", "not stored"),
        ({"background": True}, "background", "not stored"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "whole conversation"),
        ({"conversation": "conv_1"}, "conversation", "whole conversation"),
        ({"prompt": {"id": "p"}}, "prompt", "not supported"),
        ({"truncation": "auto"}, "truncation", "truncate_prompt_tokens"),
        ({"max_tokens": 3}, "max_tokens", "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than"),
        ({"max_output_tokens": 5000}, "input", "5000 of the completion"),
        ({"response_format": {"type": "json_object"}}, "response_format", "text.format"),
        ({"messages": [USER]}, "messages", "as input"),
        ({"n": 2}, "n", "not supported"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "not supported"),
        ({"stream": False, "stream_options": {}}, "stream_options", "needs stream"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "not supported",
        ),
        ({"include": ["everything"]}, "include.0", "message.output_text.logprobs"),
        ({"top_logprobs": 21}, "top_logprobs", "less than"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "'json_schema'"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", ""),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "not supported"),
        (
            {"regex": "a", "text": {"format": {"type": "json_object"}}},
            "regex",
            "text.format and regex exclude each other",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "'web_search' are not supported"),
        ({"tools": [{"type": "mcp", "server_label": "a"}]}, "tools.0", "'mcp'"),
        ({"tools": [{"type": "function"}]}, "tools.0.name", "required"),
        ({"tools": [FUNCTION, FUNCTION]}, "tools", "twice"),
        ({"tools": [{**FUNCTION, "defer_loading": True}]}, "tools.0.defer_loading", ""),
        ({"tools": [FUNCTION]}, "tools", "not supported with this model"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "name a function"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", ""),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused(ask, engine, fields, param, message, stream):
    response = ask(**{"stream": stream, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert not engine.seen


@pytest.mark.parametrize(
    "fields",
    [
        {"store": False},
        {"background": False},
        {"truncation": "disabled"},
        {"previous_response_id": None},
        {"reasoning": {"effort": None, "summary": None}},
        {"n": 1},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"service_tier": "auto", "prompt_cache_key": "k", "nobody_knows_this": 1},
    ],
)
def test_what_asks_for_nothing_is_accepted(ask, fields):
    assert ask(**fields).status_code == 200


def test_another_model(client):
    response = client.post(PATH, json={"model": "other", "input": "hi"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_a_template_that_fails(ask, engine):
    engine.tokenizer.chat_template = "{{ raise_exception('no') }}"
    error = ask().json()["error"]
    assert error["param"] == "input"
    assert "chat template" in error["message"]


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)
TYPES = ["message", "function_call", "function_call_output", "reasoning", "input_text", "function"]
OBJECTS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from([*TYPES, "json_schema", "item_reference"]) | SCALARS,
        "role": st.sampled_from(["user", "system", "assistant", "tool"]) | SCALARS,
        "content": SCALARS
        | st.lists(
            st.fixed_dictionaries({"type": st.just("input_text"), "text": SCALARS}), max_size=2
        ),
        **{
            name: st.sampled_from(["a", "{}"]) | SCALARS
            for name in (*InputCall.model_fields, "output", "format", "schema")
            if name != "type"
        },
    },
)
VALUES = st.recursive(
    SCALARS | OBJECTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
NAMES = [*ResponsesRequest.model_fields, *RESPONSES_FIELDS]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(fields=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3))
def test_any_body(client, engine, fields):
    response = client.post(
        PATH,
        content=json.dumps({"model": "alias", "input": "a", **fields}),
        headers={"content-type": "application/json"},
    )
    assert response.status_code in {200, 400, 404}, response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert len(response.content) < 4000
    assert not engine.running
    assert not engine.num_places
