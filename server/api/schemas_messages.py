"""Conversations, as clients send them."""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    JsonValue,
    StrictBool,
    StrictStr,
    Tag,
    field_validator,
)
from pydantic_core import PydanticCustomError, to_json

from headlong.server.api.schemas_common import RequestModel
from headlong.server.api.schemas_tools import SentToolCalls

MAX_MESSAGES = 16_384
MAX_PARTS = 4096
MAX_TEMPLATE_KWARGS_BYTES = 64 << 10


class TextPart(RequestModel):
    """A piece of a message's text."""

    type: Literal["text"]
    text: StrictStr

    @field_validator("type", mode="before")
    @classmethod
    def _name_what_is_refused(cls, value: object) -> object:
        if isinstance(value, str) and value != "text":
            raise PydanticCustomError(
                "unsupported_part",
                "content parts of type {kind} are not supported, send text",
                {"kind": repr(value[:40])},
            )
        return value


def content_kind(value: object) -> str | None:
    """Tells a message's text from its parts, for the discriminator of a union."""
    if isinstance(value, str):
        return "(text)"
    return "(parts)" if isinstance(value, list) else None


Content = Annotated[
    Annotated[StrictStr, Tag("(text)")]
    | Annotated[
        list[TextPart], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS), Tag("(parts)")
    ],
    Discriminator(
        content_kind,
        custom_error_type="content_form",
        custom_error_message="must be a string or a list of text parts",
    ),
]


class ChatMessage(RequestModel):
    """One turn of the conversation; `developer` is the newer name of `system`.

    Attributes:
        content: Text; an assistant that called tools need not have said anything.
        name: Who speaks, among several of the same role.
        tool_calls: What an assistant called.
        tool_call_id: Which of the calls a tool answers.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: StrictStr | None = None
    tool_calls: SentToolCalls | None = None
    tool_call_id: StrictStr | None = None


def _check_template_kwargs(variables: dict[str, JsonValue]) -> dict[str, JsonValue]:
    size = len(to_json(variables))
    if size > MAX_TEMPLATE_KWARGS_BYTES:
        raise PydanticCustomError(
            "template_kwargs_size",
            "must be {limit} bytes or fewer as JSON, got {size}",
            {"limit": MAX_TEMPLATE_KWARGS_BYTES, "size": size},
        )
    return variables


class TemplateFields(RequestModel):
    """How a chat template is rendered.

    Attributes:
        add_generation_prompt: End the prompt with the head of an assistant's turn; default yes.
        continue_final_message: Leave the last message open and continue it.
        chat_template_kwargs: Variables for the model's chat template.
        add_special_tokens: Add the tokenizer's own special tokens to those that the template
            writes; default no.
    """

    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    chat_template_kwargs: (
        Annotated[dict[str, JsonValue], AfterValidator(_check_template_kwargs)] | None
    ) = None
    add_special_tokens: StrictBool | None = None


class Conversation(TemplateFields):
    """What a chat template is rendered with.

    Attributes:
        messages: The conversation, oldest first.
    """

    messages: Annotated[
        list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
    ]
