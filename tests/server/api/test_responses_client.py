"""Responses, as OpenAI's client and a client that leaves see them."""

import http.client
import json
from urllib.parse import urlsplit

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from headlong.server.errors import EngineDeadError

PATH = "/v1/responses"
TEMPLATE = (
    "{%- if tools %}{{- '<tools>' + (tools | map(attribute='function.name') | join(',')) + '</>' }}"
    "{%- endif %}{%- for message in messages %}{{- '<' + message.role + '>' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>' + call.function.name + (call.function.arguments | tojson) }}{%- endfor %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"
)
CALL = ["Well. ", '<tool_call>{"name": "look", "argu', 'ments": {"q": "a', 'b"}}</tool_call>']
TOOLS = [
    {
        "type": "function",
        "name": "look",
        "description": "Looks something up.",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
        "strict": True,
    }
]


class Answer(BaseModel):
    q: str


@pytest.fixture(autouse=True)
def template(engine):
    engine.tokenizer.chat_template = TEMPLATE
    engine.max_model_len = 4096


@pytest.fixture
def sdk(live):
    with openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as client:
        yield client


def anonymous(response):
    told = response.to_dict()
    for each in (told, *told["output"]):
        for name in ("id", "call_id", "created_at", "completed_at"):
            each.pop(name, None)
    return told


def test_create(sdk):
    response = sdk.responses.create(
        model="alias", input="hi", instructions="Be brief.", metadata={"a": "b"}
    )
    assert response.output_text == "Hello wörld"
    assert response.status == "completed"
    assert response.usage.output_tokens == 4
    assert response.usage.input_tokens_details.cached_tokens == 0
    assert response.metadata == {"a": "b"}
    assert response.error is None


def test_stream(sdk, engine):
    fields = {"model": "alias", "input": "hi", "top_logprobs": 1}
    with sdk.responses.stream(**fields) as stream:
        deltas = [each.delta for each in stream if each.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert deltas == engine.pieces
    assert final.output_text == "Hello wörld"
    assert final.output[0].content[0].logprobs[0].top_logprobs[0].logprob == -0.25
    *_, last = sdk.responses.create(**fields, stream=True)
    assert anonymous(last.response) == anonymous(sdk.responses.create(**fields))


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "top_logprobs": 2}])
@pytest.mark.parametrize("max_output_tokens", [2, 99])
def test_everything_is_of_the_clients_types(client, engine, fields, max_output_tokens):
    """The client takes what it gets unchecked; here it is checked."""
    engine.pieces = [*CALL, "So."]
    body = {"model": "alias", "input": "hi", "max_output_tokens": max_output_tokens, **fields}
    whole = client.post(PATH, json=body)
    Response.model_validate_json(whole.content, strict=True)
    event = TypeAdapter(ResponseStreamEvent)
    for block in client.post(PATH, json={**body, "stream": True}).text.split("\n\n")[:-1]:
        event.validate_json(block.split("\ndata: ")[1], strict=True)


def test_failures_are_of_the_clients_types(client, engine):
    engine.failure, engine.fail_at = EngineDeadError("the engine stopped"), 2
    text = client.post(PATH, json={"model": "alias", "input": "hi", "stream": True}).text
    event = TypeAdapter(ResponseStreamEvent)
    *_, error, failed = [
        event.validate_json(block.split("\ndata: ")[1], strict=True)
        for block in text.split("\n\n")[:-1]
    ]
    assert (error.type, error.code) == ("error", "engine_dead")
    assert (failed.type, failed.response.error.code) == ("response.failed", "server_error")


def test_parse(sdk, engine):
    engine.pieces = ['{"q":', '"a"}']
    parsed = sdk.responses.parse(model="alias", input="hi", text_format=Answer)
    assert parsed.output_parsed == Answer(q="a")
    assert engine.seen[0][1].structure.kind == "json_schema"
    with sdk.responses.stream(model="alias", input="hi", text_format=Answer) as stream:
        assert stream.get_final_response().output_parsed == Answer(q="a")


def test_a_round_with_a_tool(sdk, engine):
    engine.pieces = CALL
    conversation = [{"role": "user", "content": "hi"}]
    with sdk.responses.stream(model="alias", input=conversation, tools=TOOLS) as stream:
        first = stream.get_final_response()
    message, call = first.output
    assert message.content[0].text.strip() == "Well."
    assert call.parsed_arguments == {"q": "ab"}
    whole = sdk.responses.create(model="alias", input=conversation, tools=TOOLS)
    assert [item.type for item in whole.output] == ["message", "function_call"]
    assert whole.output[1].arguments == call.arguments
    conversation += [item.to_dict() for item in whole.output]
    conversation.append(
        {
            "type": "function_call_output",
            "call_id": whole.output[1].call_id,
            "output": json.dumps({"found": 1}),
        }
    )
    engine.pieces = ["Found."]
    last = sdk.responses.create(model="alias", input=conversation, tools=TOOLS)
    assert last.output_text == "Found."
    assert engine.tokenizer.decode(engine.seen[-1][0]) == (
        '<tools>look</><user>hi<assistant>Well.<tool_call>look{"q": "ab"}'
        '<tool>{"found": 1}<assistant>'
    )


def test_errors_have_their_classes(sdk):
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.responses.create(model="other", input="hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as overflow:
        sdk.responses.create(model="alias", input="a" * 5000)
    assert overflow.value.code == "context_length_exceeded"
    assert overflow.value.param == "input"
    with pytest.raises(openai.BadRequestError, match="not stored"):
        sdk.responses.create(model="alias", input="hi", previous_response_id="resp_1")
    for method in (sdk.responses.retrieve, sdk.responses.delete, sdk.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="stores none"):
            method("resp_1")
    with pytest.raises(openai.NotFoundError, match="stores none"):
        sdk.responses.input_items.list("resp_1")


def test_an_error_inside_a_stream(sdk, engine):
    engine.failure, engine.fail_at = EngineDeadError("the engine stopped"), 2
    stream = sdk.responses.create(model="alias", input="hi", stream=True)
    seen = []
    with pytest.raises(openai.APIError, match="the engine stopped") as raised:
        seen.extend(event.type for event in stream)
    assert raised.value.code == "engine_dead"
    assert seen[-1] == "response.output_text.delta"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("hang_at", [0, 2])
def test_a_client_that_leaves_frees_its_request(live, engine, stream, hang_at):
    engine.hang_at = hang_at
    address = urlsplit(live)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
    body = json.dumps({"model": "alias", "input": "hi", "stream": stream})
    connection.request("POST", PATH, body, {"content-type": "application/json"})
    if stream and hang_at:
        assert connection.getresponse().readline() == b"event: response.created\n"
    assert engine.hanging.wait(20)
    connection.close()
    assert engine.idle.wait(20)
    assert engine.num_aborted == 1
