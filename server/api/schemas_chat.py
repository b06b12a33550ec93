"""Bodies of ``POST /v1/chat/completions``."""

from typing import Literal

from pydantic import StrictBool

from headlong.server.api.schemas_common import (
    FinishedBy,
    LogprobCount,
    ResponseModel,
    SamplingFields,
    Usage,
)
from headlong.server.api.schemas_messages import Conversation
from headlong.server.api.schemas_structures import StructureFields
from headlong.server.api.schemas_tools import ToolCall, ToolCallDelta, ToolFields

AnsweredBy = FinishedBy | Literal["tool_calls"]


class ChatRequest(Conversation, ToolFields, StructureFields, SamplingFields):
    """Answer a conversation.

    Attributes:
        logprobs: Report the log probability of each token.
        top_logprobs: Report this many alternatives as well.
    """

    logprobs: StrictBool | None = None
    top_logprobs: LogprobCount | None = None


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
    """The answer; without content if all of it are calls."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(ResponseModel):
    """One answer to the conversation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: AnsweredBy
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatResponse(ResponseModel):
    """The answers as a whole; token ids are told with `return_token_ids`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class ChatDelta(ResponseModel):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(ResponseModel):
    """What a chunk says of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: AnsweredBy | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunk(ResponseModel):
    """One event of a streamed answer; the first has the prompt's token ids, if they are told."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
