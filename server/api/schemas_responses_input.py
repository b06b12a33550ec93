"""The input of ``POST /v1/responses``: a conversation as a list of items."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, StrictStr, Tag, field_validator
from pydantic_core import PydanticCustomError, from_json

from headlong.server.api.schemas_common import RequestModel
from headlong.server.api.schemas_messages import MAX_MESSAGES, MAX_PARTS, content_kind
from headlong.server.api.schemas_tools import FunctionName

_TEXT_PARTS = ("input_text", "output_text", "text")
_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


class InputText(RequestModel):
    """A piece of text: what is said to the model, or what an earlier answer said."""

    type: Literal["input_text", "output_text", "text"]
    text: StrictStr

    @field_validator("type", mode="before")
    @classmethod
    def _name_what_is_refused(cls, value: object) -> object:
        if isinstance(value, str) and value not in _TEXT_PARTS:
            raise PydanticCustomError(
                "unsupported_part",
                "content of type {kind} is not supported, send input_text",
                {"kind": repr(value[:40])},
            )
        return value


InputContent = Annotated[
    Annotated[StrictStr, Tag("(text)")]
    | Annotated[list[InputText], Field(fail_fast=True, max_length=MAX_PARTS), Tag("(parts)")],
    Discriminator(
        content_kind,
        custom_error_type="content_form",
        custom_error_message="must be a string or a list of input_text parts",
    ),
]


class InputMessage(RequestModel):
    """One turn of the conversation; items that do not tell their type are such."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: InputContent


class InputCall(RequestModel):
    """A call that an earlier answer made.

    Attributes:
        call_id: Tells the call from others.
        name: The function.
        arguments: Text of a JSON object; empty text stands for no arguments.
    """

    type: Literal["function_call"]
    call_id: StrictStr
    name: FunctionName
    arguments: StrictStr

    @field_validator("arguments")
    @classmethod
    def _be_an_object(cls, value: str) -> str:
        try:
            parsed = from_json(value or "{}", allow_inf_nan=False)
        except ValueError as error:
            raise PydanticCustomError(
                "arguments_json", "is not valid JSON: {error}", {"error": str(error)}
            ) from None
        if not isinstance(parsed, dict):
            raise PydanticCustomError("arguments_object", "must be the text of a JSON object")
        return value


class InputCallOutput(RequestModel):
    """What a call came to; the call itself lies before it in the input."""

    type: Literal["function_call_output"]
    call_id: StrictStr
    output: InputContent


class InputReasoning(RequestModel):
    """What a model thought before an earlier answer.

    It is left out of the prompt. No answer of this server has such an item, so it is another
    model's, and chat templates show no thoughts of earlier turns.
    """

    type: Literal["reasoning"]


def _item_type(value: object) -> object:
    if not isinstance(value, dict):
        return None
    kind = value.get("type")
    return "message" if kind is None else kind


def _refuse_by_name(value: object) -> object:
    kind = _item_type(value)
    if kind == "item_reference":
        raise PydanticCustomError(
            "item_reference", "refers to an item, and items are not stored: send the item itself"
        )
    if isinstance(kind, str) and kind not in _ITEMS:
        raise PydanticCustomError(
            "unsupported_item",
            "items of type {kind} are not supported, send message, function_call and "
            "function_call_output items",
            {"kind": repr(kind[:40])},
        )
    return value


def _item_kind(value: object) -> str | None:
    kind = _item_type(value)
    return f"({kind})" if kind in _ITEMS else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("(message)")]
    | Annotated[InputCall, Tag("(function_call)")]
    | Annotated[InputCallOutput, Tag("(function_call_output)")]
    | Annotated[InputReasoning, Tag("(reasoning)")],
    Discriminator(
        _item_kind,
        custom_error_type="item_form",
        custom_error_message="must be an object with a type, or with role and content",
    ),
    BeforeValidator(_refuse_by_name),
]


def _input_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "(text)"
    return "(items)" if isinstance(value, list) else None


ResponseInput = Annotated[
    Annotated[StrictStr, Tag("(text)")]
    | Annotated[
        list[InputItem],
        Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES),
        Tag("(items)"),
    ],
    Discriminator(
        _input_kind,
        custom_error_type="input_form",
        custom_error_message="must be a string or a list of items",
    ),
]
