"""The request of ``POST /v1/responses``, OpenAI's API of items."""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
)
from pydantic_core import PydanticCustomError

from headlong.server.api.schemas_common import GenerationFields, LogprobCount, RequestModel
from headlong.server.api.schemas_messages import TemplateFields
from headlong.server.api.schemas_responses_input import ResponseInput
from headlong.server.api.schemas_structures import (
    FreeStructureFields,
    JSONObjectFormat,
    NamedSchema,
    TextFormat,
)
from headlong.server.api.schemas_tools import (
    MAX_TOOLS,
    FunctionDefinition,
    FunctionName,
    Tool,
    check_tools,
)

MAX_METADATA = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MAX_INCLUDE = 64

Includable = Literal[
    "message.output_text.logprobs",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]
"""What an answer may be asked to tell beside its text.

The others are details of items that no answer of this server has: they ask for nothing.
"""

Metadata = Annotated[
    dict[
        Annotated[StrictStr, Field(max_length=MAX_METADATA_KEY_CHARS)],
        Annotated[StrictStr, Field(max_length=MAX_METADATA_VALUE_CHARS)],
    ],
    Field(fail_fast=True, max_length=MAX_METADATA),
]


class FlatSchemaFormat(NamedSchema):
    """JSON that validates against a schema."""

    type: Literal["json_schema"]


def _format_kind(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"({kind})" if kind in ("text", "json_object", "json_schema") else None


AnswerFormat = Annotated[
    Annotated[TextFormat, Tag("(text)")]
    | Annotated[JSONObjectFormat, Tag("(json_object)")]
    | Annotated[FlatSchemaFormat, Tag("(json_schema)")],
    Discriminator(
        _format_kind,
        custom_error_type="text_format",
        custom_error_message="type must be 'text', 'json_object' or 'json_schema'",
    ),
]


class TextConfig(RequestModel):
    """What the text of the answer is to be like."""

    format: AnswerFormat | None = None


def _refuse_tool_by_name(value: object) -> object:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise PydanticCustomError(
            "unsupported_tool",
            "tools of type {kind} are not supported, send functions",
            {"kind": repr(kind[:40])},
        )
    return value


class FlatFunction(FunctionDefinition):
    """A function that the model may call."""

    type: Literal["function"]

    @property
    def as_tool(self) -> Tool:
        """The same, as chat completions have it."""
        function = FunctionDefinition(
            name=self.name,
            description=self.description,
            parameters=self.parameters,
            strict=self.strict,
        )
        return Tool(type="function", function=function)


def _check_functions(functions: list[FlatFunction]) -> list[FlatFunction]:
    check_tools([each.as_tool for each in functions])
    return functions


Functions = Annotated[
    list[Annotated[FlatFunction, BeforeValidator(_refuse_tool_by_name)]],
    Field(fail_fast=True, max_length=MAX_TOOLS),
    AfterValidator(_check_functions),
]


class FlatFunctionChoice(RequestModel):
    """The function that must be called."""

    type: Literal["function"]
    name: FunctionName


def _choice_kind(value: object) -> str | None:
    if value in ("none", "auto", "required"):
        return "(mode)"
    kind = value.get("type") if isinstance(value, dict) else None
    return "(named)" if kind == "function" else None


FlatToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("(mode)")]
    | Annotated[FlatFunctionChoice, Tag("(named)")],
    Discriminator(
        _choice_kind,
        custom_error_type="tool_choice",
        custom_error_message="must be 'none', 'auto', 'required' or name a function",
    ),
]


class ResponsesRequest(TemplateFields, FreeStructureFields, GenerationFields):
    """Answer a conversation, as items.

    Nothing is stored: a client sends the whole conversation each time.

    Attributes:
        input: What a user says, or the items of the conversation, oldest first.
        instructions: A system message before all others.
        max_output_tokens: Most tokens of the answer; left out, as many as the context holds.
        text: The form of the answer's text.
        tools: Functions that the model may call.
        tool_choice: Whether it must; left out, "auto".
        parallel_tool_calls: Whether it may call several at once; left out, it may.
        include: What to tell beside the text.
        top_logprobs: Tell log probabilities of each token and of this many alternatives.
        metadata: The response has the same.
        stream_options: Nothing that it may hold changes the stream.
    """

    input: ResponseInput
    instructions: StrictStr | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    text: TextConfig | None = None
    tools: Functions | None = None
    tool_choice: FlatToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    include: Annotated[list[Includable], Field(fail_fast=True, max_length=MAX_INCLUDE)] | None = (
        None
    )
    top_logprobs: LogprobCount | None = None
    metadata: Metadata | None = None
    stream_options: RequestModel | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer tells log probabilities."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or [])
