"""Bodies of ``POST /v1/chat/completions``."""

from typing import Annotated, Literal

from pydantic import (
    Discriminator,
    Field,
    JsonValue,
    StrictBool,
    StrictStr,
    Tag,
    field_validator,
)
from pydantic_core import PydanticCustomError

from headlong.server.schemas_common import (
    FinishedBy,
    LogprobCount,
    RequestModel,
    ResponseModel,
    SamplingFields,
    Usage,
)


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


def _content_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "(text)"
    return "(parts)" if isinstance(value, list) else None


Content = Annotated[
    Annotated[StrictStr, Tag("(text)")]
    | Annotated[list[TextPart], Field(fail_fast=True, min_length=1), Tag("(parts)")],
    Discriminator(
        _content_kind,
        custom_error_type="content_form",
        custom_error_message="must be a string or a list of text parts",
    ),
]


class ChatMessage(RequestModel):
    """One turn of the conversation; `developer` is the newer name of `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: StrictStr | None = None


class ChatRequest(SamplingFields):
    """Answer a conversation.

    Attributes:
        messages: The conversation, oldest first.
        logprobs: Report the log probability of each token.
        top_logprobs: Report this many alternatives as well.
        add_generation_prompt: End the prompt with the head of an assistant's turn; default yes.
        continue_final_message: Leave the last message open and continue it.
        chat_template_kwargs: Variables for the model's chat template.
    """

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
    logprobs: StrictBool | None = None
    top_logprobs: LogprobCount | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None


class TokenAlternative(ResponseModel):
    """A token, its natural-log probability, and its bytes where the text shows all of them."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TokenAlternative):
    """The token that was chosen, and the most probable ones in its place, best first."""

    top_logprobs: list[TokenAlternative]


class ChatLogprobs(ResponseModel):
    """One entry for each token of the answer."""

    content: list[ChatTokenLogprob]


class AssistantMessage(ResponseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str


class ChatChoice(ResponseModel):
    """One answer to the conversation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishedBy
    stop_reason: int | str | None


class ChatResponse(ResponseModel):
    """The answer as a whole."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(ResponseModel):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(ResponseModel):
    """What a chunk says of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishedBy | None
    stop_reason: int | str | None = None


class ChatChunk(ResponseModel):
    """One event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
