"""What ``POST /v1/responses`` answers: a response, or the events that build one up."""

from typing import Literal

from pydantic import JsonValue

from headlong.server.api.schemas_common import KVCacheUsage, NamedEvent, ResponseModel

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class TextAlternative(ResponseModel):
    """A token, its natural-log probability, and its bytes; none where the text is not all of it."""

    token: str
    logprob: float
    bytes: list[int]


class TextLogprob(TextAlternative):
    """The token that was chosen, and the most probable ones in its place, best first."""

    top_logprobs: list[TextAlternative]


class OutputText(ResponseModel):
    """All text of a message.

    Attributes:
        annotations: None; the built-in tools of OpenAI's API make them.
        logprobs: One entry for each token, if they were asked for.
    """

    type: Literal["output_text"]
    text: str
    annotations: list[JsonValue]
    logprobs: list[TextLogprob]


class OutputMessage(ResponseModel):
    """Something that the model said."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(ResponseModel):
    """A call that the model asks for.

    Attributes:
        id: The item's.
        call_id: The call's; a `function_call_output` item refers to it.
        name: The function.
        arguments: Text of a JSON object.
    """

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputCall


class InputTokensDetails(ResponseModel):
    """Of the prompt's tokens, those that the prefix cache had, and those that were computed."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(ResponseModel):
    """Reasoning is not told apart from the answer, and counts as such."""

    reasoning_tokens: int


class ResponseUsage(ResponseModel):
    """What the request took.

    Attributes:
        kv_cache: Known when the response has ended.
        cache_misses: If asked for, prompt tokens that the prefix cache did not have, by reason.
    """

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    kv_cache: KVCacheUsage | None = None
    cache_misses: dict[str, int] | None = None


class ResponseFailure(ResponseModel):
    """Why a response failed."""

    code: Literal["server_error"]
    message: str


class IncompleteDetails(ResponseModel):
    """Why a response is incomplete: its tokens, or the context's, were used up."""

    reason: Literal["max_output_tokens"]


class ResponseObject(ResponseModel):
    """A response, with what the request asked for; fields of OpenAI's that have no use are null.

    Attributes:
        created_at: Seconds of Unix time.
        completed_at: The same.
        temperature: Used to sample.
        top_p: The same.
        prompt_token_ids: Told with `return_token_ids`, when the response has ended.
        token_ids: The same, of all that the model wrote.
    """

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: ResponseStatus
    background: Literal[False]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: None
    store: Literal[False]
    temperature: float
    text: dict[str, JsonValue]
    tool_choice: JsonValue
    tools: list[dict[str, JsonValue]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class ResponseEvent(NamedEvent):
    """One event of a streamed response.

    Attributes:
        sequence_number: Counts the events of a stream from 0.
    """

    sequence_number: int = 0


class StateEvent(ResponseEvent):
    """The response, when it has begun and when it has ended."""

    response: ResponseObject


class ItemEvent(ResponseEvent):
    """An item of the output is added, empty, or done."""

    output_index: int
    item: OutputItem


class _InItem(ResponseEvent):
    output_index: int
    item_id: str


class PartEvent(_InItem):
    """The text of a message is added, empty, or done."""

    content_index: int
    part: OutputText


class TextDelta(_InItem):
    """More text of a message."""

    content_index: int
    delta: str
    logprobs: list[TextLogprob]


class TextDone(_InItem):
    """The whole text of a message."""

    content_index: int
    text: str
    logprobs: list[TextLogprob]


class ArgumentsDelta(_InItem):
    """More of a call's arguments."""

    delta: str


class ArgumentsDone(_InItem):
    """All of a call's arguments."""

    name: str
    arguments: str


class NestedError(ResponseModel):
    """An error, with a code in any case."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorEvent(ResponseEvent):
    """The response failed.

    OpenAI documents the error's fields in the event itself; its servers send them, and its clients
    look for them, in `error`.
    """

    code: str
    message: str
    param: str | None
    error: NestedError
