import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from headlong.server.api.schemas_tools import MAX_TOOLS, MAX_TOOLS_BYTES, ToolFields
from headlong.server.api.tool_calls import Answer, read_answer
from headlong.server.api.tool_choice import ToolPlan, plan_tools
from headlong.server.api.tool_styles import HERMES, LLAMA3_JSON, ToolStyle, choose_tool_style
from headlong.server.engine.sampling_params import Structure
from headlong.server.errors import InvalidRequestError
from support.structured import Writer
from support.tiny_models import save_byte_tokenizer

CITY: dict[str, object] = {
    "type": "object",
    "properties": {
        "city": {"$ref": "#/$defs/city"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Paris", "Łódź"]}},
}
EMPTY: dict[str, object] = {"type": "object", "maxProperties": 0}
SCHEMAS = {"get_weather": CITY, "now": EMPTY}


def tool(name: str, parameters: object = None, **fields: object) -> dict[str, object]:
    function = {"name": name, **fields}
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


WEATHER = tool("get_weather", CITY, description="Tells the weather.")
NOW = tool("now")


def named(name: str) -> dict[str, object]:
    return {"type": "function", "function": {"name": name}}


def plan(
    style: ToolStyle | None = HERMES, structure: Structure | None = None, **fields: object
) -> ToolPlan:
    return plan_tools(ToolFields.model_validate(fields), style, structure)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": []},
        {"tools": None, "tool_choice": None},
        {"tool_choice": "none"},
        {"tools": [WEATHER], "tool_choice": "none"},
        {"parallel_tool_calls": True},
    ],
)
def test_without_calls_the_model_is_told_of_no_tools(fields: dict[str, object]) -> None:
    structure = Structure("json_object")
    for style in (HERMES, None):
        planned = plan(style, structure, **fields)
        assert planned == ToolPlan(structure=structure)
        assert planned.parser() is None


def test_the_template_gets_the_tools() -> None:
    schema = {"type": "object", "properties": {"x": {"default": None}}}
    planned = plan(tools=[tool("f", schema, description="d", strict=False), NOW])
    assert planned.template_tools == [
        {
            "type": "function",
            "function": {"name": "f", "description": "d", "parameters": schema},
        },
        {
            "type": "function",
            "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
        },
    ]
    assert planned.structure is None
    assert planned.parser() is not None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": "auto"}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": named("later")}, "tool_choice"),
        ({"tools": [NOW], "style": None}, "tools"),
        (
            {"tools": [NOW], "structure": Structure("regex", "a", param="regex")},
            "regex",
        ),
        (
            {
                "tools": [tool("f", {"type": "object", "description": "x" * 70_000})],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        plan(**fields)  # type: ignore[arg-type]
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "location"),
    [
        ({"tools": [tool("")]}, "name"),
        ({"tools": [tool("a b")]}, "name"),
        ({"tools": [tool("a\n")]}, "name"),
        ({"tools": [tool("a" * 65)]}, "name"),
        ({"tools": [{"type": "retrieval"}]}, "type"),
        ({"tools": [tool("f", {"type": "array"})]}, "parameters"),
        ({"tools": [tool("f", [])]}, "parameters"),
        ({"tools": [NOW, NOW]}, "tools"),
        ({"tools": [tool(f"f{index}") for index in range(MAX_TOOLS + 1)]}, "tools"),
        ({"tools": [tool("f", description="x" * MAX_TOOLS_BYTES)]}, "tools"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "function"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ],
)
def test_malformed_fields_are_refused_by_name(fields: dict[str, object], location: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ToolFields.model_validate(fields)
    assert location in caught.value.errors()[0]["loc"]


@pytest.fixture(scope="module", params=["text", "token", "special"])
def writer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Writer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if request.param != "text":
        marks = ["<tool_call>", "</tool_call>", "<|python_tag|>"]
        tokenizer.add_tokens(marks, special_tokens=request.param == "special")
    return Writer(tokenizer)


@pytest.fixture(scope="module", params=["hermes", "llama3_json"])
def style(request: pytest.FixtureRequest, writer: Writer) -> ToolStyle:
    found = choose_tool_style(request.param, writer.tokenizer)
    assert found is not None
    return found


def write(writer: Writer, planned: ToolPlan, seed: int, **params: object) -> tuple[str, str]:
    assert planned.structure is not None
    return writer.write(
        planned.structure,
        seed,
        skip_special_tokens=not planned.keep_special_tokens,
        **{"max_tokens": 1500, **params},
    )


def read(planned: ToolPlan, text: str) -> Answer:
    parser = planned.parser()
    assert parser is not None
    answer = read_answer(parser, text)
    for call in answer.tool_calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return answer


@pytest.mark.parametrize("seed", range(5))
def test_required_calls_are_made_and_are_valid(writer: Writer, style: ToolStyle, seed: int) -> None:
    planned = plan(style, tools=[WEATHER, NOW], tool_choice="required")
    text, reason = write(writer, planned, seed)
    answer = read(planned, text)
    assert reason == "stop"
    assert answer.content is None
    assert answer.tool_calls


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_named_function_is_called_once(writer: Writer, style: ToolStyle, name: str) -> None:
    planned = plan(style, tools=[WEATHER, NOW], tool_choice=named(name))
    for seed in range(3):
        text, reason = write(writer, planned, seed)
        answer = read(planned, text)
        assert reason == "stop"
        assert [call.function.name for call in answer.tool_calls] == [name]


def test_calls_one_at_a_time(writer: Writer, style: ToolStyle) -> None:
    planned = plan(style, tools=[NOW], tool_choice="required", parallel_tool_calls=False)
    for seed in range(4):
        text, reason = write(writer, planned, seed)
        assert reason == "stop"
        assert len(read(planned, text).tool_calls) == 1


@pytest.mark.parametrize(
    ("tools", "fields"),
    [([WEATHER, NOW], {"parallel_tool_calls": False}), ([tool("now", strict=True)], {})],
)
def test_a_free_choice_keeps_what_was_promised(
    writer: Writer, style: ToolStyle, tools: list[object], fields: dict[str, object]
) -> None:
    """Text and calls are both to be had, and calls are valid."""
    planned = plan(style, tools=tools, **fields)
    begin = "<tool_call>" if style.name == "hermes" else '{"'
    for seed in range(6):
        text, _ = write(writer, planned, seed, begin=begin, max_tokens=300, temperature=0.0)
        calls = read(planned, text).tool_calls
        assert calls
        assert len(calls) == 1 or not fields
    text, _ = write(writer, planned, 0, begin="Well", max_tokens=40, temperature=0.0)
    assert read(planned, text) == Answer(text, ())


def test_what_a_schema_cannot_have_enforced_is_refused_of_strict_tools_alone(
    writer: Writer, style: ToolStyle
) -> None:
    schema = {"type": "object", "properties": {"x": {"not": {"type": "integer"}}}}
    loose = plan(style, tools=[tool("f", schema)], tool_choice="required")
    strict = plan(style, tools=[tool("f", schema, strict=True)], tool_choice="required")
    assert loose.structure is not None
    assert strict.structure is not None
    assert writer.compiler.submit(loose.structure).result(60)
    with pytest.raises(InvalidRequestError) as caught:
        writer.compiler.submit(strict.structure).result(60)
    assert caught.value.param == "tools"


def test_many_tools_can_be_required(writer: Writer, style: ToolStyle) -> None:
    tools = [tool(f"function_{index}", CITY) for index in range(MAX_TOOLS)]
    planned = plan(style, tools=tools, tool_choice="required", parallel_tool_calls=False)
    text, reason = write(writer, planned, 0)
    assert reason == "stop"
    parser = planned.parser()
    assert parser is not None
    assert len(read_answer(parser, text).tool_calls) == 1


def test_special_marks_are_kept_where_they_are_needed() -> None:
    for style, kept in ((HERMES, True), (LLAMA3_JSON, False)):
        special = replace(style, special_tokens=frozenset({style.begin}))
        assert plan(special, tools=[NOW]).keep_special_tokens == kept
        assert not plan(style, tools=[NOW]).keep_special_tokens


def test_the_demo_model_knows_no_tools() -> None:
    folder = Path(__file__).parents[3] / "demo" / "model"
    assert choose_tool_style("auto", AutoTokenizer.from_pretrained(folder)) is None
