"""Tools that a model may call, and the calls that it makes."""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    JsonValue,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    field_validator,
)
from pydantic_core import PydanticCustomError, to_json

from headlong.server.api.schemas_common import RequestModel, ResponseModel
from headlong.server.api.schemas_structures import JSONSchema

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 << 10
MAX_TOOL_CALLS = 128

FunctionName = Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(RequestModel):
    """A function that the model may call.

    Attributes:
        name: What the model calls it.
        description: For the model.
        parameters: JSON Schema of its arguments, an object; left out, it takes none.
        strict: Keep its calls to `parameters` even where calling is the model's choice.
    """

    name: FunctionName
    description: StrictStr | None = None
    parameters: JSONSchema | None = None
    strict: StrictBool | None = None

    @field_validator("parameters")
    @classmethod
    def _describe_an_object(cls, value: JSONSchema | None) -> JSONSchema | None:
        if value is not None and value.get("type", "object") != "object":
            raise PydanticCustomError("parameters_type", "must be the schema of an object")
        return value


class Tool(RequestModel):
    """Something that the model may call: a function."""

    type: Literal["function"]
    function: FunctionDefinition


def check_tools(tools: list[Tool]) -> list[Tool]:
    """Validates the tools of one request together.

    Raises:
        PydanticCustomError: Two have the same name, or all are too long.
    """
    names = {tool.function.name for tool in tools}
    if len(names) < len(tools):
        raise PydanticCustomError("tool_names", "must not name a function twice")
    size = len(to_json([tool.model_dump() for tool in tools]))
    if size > MAX_TOOLS_BYTES:
        raise PydanticCustomError(
            "tools_size",
            "must be {limit} bytes or fewer as JSON, got {size}",
            {"limit": MAX_TOOLS_BYTES, "size": size},
        )
    return tools


Tools = Annotated[
    list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS), AfterValidator(check_tools)
]


class FunctionChoice(RequestModel):
    """The function that must be called."""

    name: FunctionName


class NamedToolChoice(RequestModel):
    """One tool that must be called."""

    type: Literal["function"]
    function: FunctionChoice


def _choice_kind(value: object) -> str | None:
    if value in ("none", "auto", "required"):
        return "(mode)"
    return "(named)" if isinstance(value, dict) else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("(mode)")]
    | Annotated[NamedToolChoice, Tag("(named)")],
    Discriminator(
        _choice_kind,
        custom_error_type="tool_choice",
        custom_error_message="must be 'none', 'auto', 'required' or name a function",
    ),
]


class ToolFields(RequestModel):
    """The request fields of tools.

    Attributes:
        tools: What the model may call.
        tool_choice: Whether it must; left out, it is "auto" with tools and "none" without.
        parallel_tool_calls: Whether one answer may hold several calls; left out, it may.
    """

    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None


class SentFunctionCall(RequestModel):
    """The function that was called, and the text of a JSON object with its arguments."""

    name: FunctionName
    arguments: StrictStr


class SentToolCall(RequestModel):
    """A call that an earlier answer made, as the client sends it back."""

    id: StrictStr
    type: Literal["function"]
    function: SentFunctionCall


SentToolCalls = Annotated[
    list[SentToolCall], Field(fail_fast=True, min_length=1, max_length=MAX_TOOL_CALLS)
]


class FunctionCall(ResponseModel):
    """The function to call, and the text of a JSON object with its arguments."""

    name: str
    arguments: str


class ToolCall(ResponseModel):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class FunctionCallDelta(ResponseModel):
    """What a chunk adds to a call; the name comes once."""

    name: str | None = None
    arguments: str


class ToolCallDelta(ResponseModel):
    """What a chunk says of one call; its id, type and name come with the first."""

    index: StrictInt
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta


TemplateTool = dict[str, JsonValue]
"""A tool as chat templates read it."""
