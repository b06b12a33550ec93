"""Tools over HTTP: to the template, to the engine, and back as calls."""

import json

import openai
import pytest
from starlette.testclient import TestClient

from headlong.server.app import create_app
from headlong.server.config import ServerConfig

PATH = "/v1/chat/completions"
TEMPLATE = (
    "{%- if tools %}{{- '<tools>' + (tools | map(attribute='function.name') | join(',')) + '</>' }}"
    "{%- endif %}{%- for message in messages %}{{- '<' + message.role + '>' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>' + call.function.name + (call.function.arguments | tojson) }}{%- endfor %}"
    "{{- '</>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
        },
    }
    for name in ("look", "find")
]
CALL = ["<tool", '_call>{"name": "look", "argu', 'ments": {"q": "a', 'b"}}</tool', "_call>"]
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def template(engine):
    engine.tokenizer.chat_template = TEMPLATE
    engine.max_model_len = 4096


def prompts(engine):
    return [engine.tokenizer.decode(ids) for ids, _ in engine.seen]


def test_an_answer_that_is_a_call(post, engine):
    engine.pieces = CALL
    body = post(PATH, tools=TOOLS).json()
    [choice] = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] is None
    [call] = message["tool_calls"]
    assert call["type"] == "function"
    assert call["id"]
    assert call["function"]["name"] == "look"
    assert json.loads(call["function"]["arguments"]) == {"q": "ab"}
    assert prompts(engine) == ["<tools>look,find</><user>hi</><assistant>"]


def test_a_streamed_call(post, engine, events):
    engine.pieces = ["Well. ", *CALL]
    *chunks, _ = events(post(PATH, tools=TOOLS, stream=True).text)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert choices[-1]["delta"] == {}
    assert "".join(choice["delta"].get("content") or "" for choice in choices).strip() == "Well."
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert {call["index"] for call in calls} == {0}
    first, *others = calls
    assert first["id"]
    assert first["type"] == "function"
    assert first["function"]["name"] == "look"
    assert not any("id" in call or "name" in call["function"] for call in others)
    arguments = "".join(call["function"]["arguments"] for call in calls)
    assert json.loads(arguments) == {"q": "ab"}
    assert len(others) > 1, "arguments come as they are written"


def test_several_calls_and_several_completions(post, engine):
    engine.pieces = [*CALL, *(piece.replace("look", "find") for piece in CALL)]
    body = post(PATH, tools=TOOLS, n=2).json()
    ids = set()
    for choice in body["choices"]:
        calls = choice["message"]["tool_calls"]
        assert [call["function"]["name"] for call in calls] == ["look", "find"]
        ids |= {call["id"] for call in calls}
    assert len(ids) == 4


def test_text_stays_text(post, engine):
    [choice] = post(PATH, tools=TOOLS).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello wörld"}
    assert choice["finish_reason"] == "stop"
    engine.pieces = CALL
    [choice] = post(PATH, tools=TOOLS, tool_choice="none").json()["choices"]
    assert choice["message"]["content"] == "".join(CALL)
    assert prompts(engine)[1] == "<user>hi</><assistant>"


def test_a_call_that_was_cut_off(post, engine):
    engine.pieces = CALL
    [choice] = post(PATH, tools=TOOLS, max_tokens=3).json()["choices"]
    assert choice["finish_reason"] == "length"


def test_what_was_written_of_a_call_that_was_cut_off_is_not_shown(post, engine, events):
    engine.pieces = ["Well.", "\n<tool_call>\n", '{"name": "lo', 'ok", "argu', "never"]
    [choice] = post(PATH, tools=TOOLS, max_tokens=4).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Well."}
    assert choice["finish_reason"] == "length"
    *chunks, _ = events(post(PATH, tools=TOOLS, max_tokens=4, stream=True).text)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(each["delta"].get("content") or "" for each in choices) == "Well."
    assert choices[-1]["finish_reason"] == "length"
    engine.pieces = engine.pieces[:4]
    [choice] = post(PATH, tools=TOOLS).json()["choices"]
    assert choice["message"]["content"] == "".join(engine.pieces)
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "find"}}])
def test_calls_that_must_be_made_have_a_grammar(post, engine, choice):
    assert post(PATH, tools=TOOLS, tool_choice=choice).status_code == 200
    assert engine.seen[0][1].structure.kind == "grammar"


def test_auto_leaves_the_text_free(post, engine):
    assert post(PATH, tools=TOOLS, tool_choice="auto").status_code == 200
    assert engine.seen[0][1].structure is None


def test_a_conversation_with_calls_and_results(post, engine):
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "look", "arguments": '{"q": "x"}'},
    }
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "found"},
    ]
    assert post(PATH, messages=messages, tools=TOOLS).status_code == 200
    assert prompts(engine) == [
        '<tools>look,find</><user>hi</><assistant><tool_call>look{"q": "x"}</>'
        "<tool>found</><assistant>"
    ]


def test_tokenize_offers_the_same_tools(client, post, engine):
    post(PATH, tools=TOOLS)
    body = client.post("/tokenize", json={"messages": USER, "tools": TOOLS}).json()
    assert body["tokens"] == engine.seen[0][0]


def test_log_probabilities_of_a_call(post, engine, events):
    engine.pieces = CALL
    whole = post(PATH, tools=TOOLS, logprobs=True).json()["choices"][0]
    assert [entry["token"] for entry in whole["logprobs"]["content"]] == CALL
    *chunks, _ = events(post(PATH, tools=TOOLS, logprobs=True, stream=True).text)
    tokens = [
        entry["token"]
        for chunk in chunks
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert tokens == CALL


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": TOOLS * 65}, "tools"),
        ({"tools": TOOLS * 2}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "maybe", "tools": TOOLS}, "tool_choice"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(post, engine, fields, param):
    response = post(PATH, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not engine.admitted


@pytest.mark.parametrize(("setting", "status"), [("none", 400), ("hermes", 200)])
def test_the_setting_wins_over_the_template(engine, setting, status):
    if setting == "hermes":
        engine.tokenizer.chat_template = "{{ messages[0].content }}"
    config = ServerConfig(served_model_name=("m",), tool_call_parser=setting)
    with TestClient(create_app(engine, config)) as client:
        body = {"model": "m", "messages": USER, "tools": TOOLS}
        assert client.post(PATH, json=body).status_code == status


def test_the_openai_client(live, engine):
    engine.pieces = CALL
    with openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as sdk:
        whole = sdk.chat.completions.create(model="alias", messages=USER, tools=TOOLS)
        [call] = whole.choices[0].message.tool_calls
        assert call.function.name == "look"
        with sdk.chat.completions.stream(model="alias", messages=USER, tools=TOOLS) as stream:
            final = stream.get_final_completion()
        [streamed] = final.choices[0].message.tool_calls
        assert streamed.function.arguments == call.function.arguments
        assert final.choices[0].finish_reason == "tool_calls"
