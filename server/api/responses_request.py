"""From a request for a response to the chat request that it comes to."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from headlong.server.api.schemas_chat import ChatRequest
from headlong.server.api.schemas_common import GenerationFields
from headlong.server.api.schemas_messages import ChatMessage, TemplateFields, TextPart
from headlong.server.api.schemas_responses import (
    FlatFunctionChoice,
    FlatSchemaFormat,
    ResponsesRequest,
    TextConfig,
)
from headlong.server.api.schemas_responses_input import (
    InputCall,
    InputCallOutput,
    InputItem,
    InputMessage,
    InputText,
)
from headlong.server.api.schemas_structures import FreeStructureFields, JSONObjectFormat
from headlong.server.api.schemas_tools import (
    FunctionChoice,
    NamedToolChoice,
    SentFunctionCall,
    SentToolCall,
    ToolChoice,
)
from headlong.server.api.structures import json_schema_structure, structure_of
from headlong.server.api.unsupported import (
    RESPONSES_FIELDS,
    RESPONSES_HINTS,
    STREAM_OPTIONS_FIELDS,
    refuse_unsupported,
)
from headlong.server.engine.sampling_params import Structure
from headlong.server.errors import InvalidRequestError
from headlong.server.http_errors import shorten

_SHARED = (
    *GenerationFields.model_fields,
    *TemplateFields.model_fields,
    *FreeStructureFields.model_fields,
)


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """Says as a chat request what a request for a response asks for.

    Args:
        body: Fits its schema.

    Returns:
        The request, without the form of its text, which `response_structure` tells.

    Raises:
        InvalidRequestError: A field is not supported, or the items do not fit each other.
    """
    _refuse(body)
    logprobs = body.wants_logprobs
    # Each value has been checked by the type of its own field.
    return ChatRequest.model_construct(
        **{name: getattr(body, name) for name in _SHARED},
        messages=_messages(body),
        max_completion_tokens=body.max_output_tokens,
        logprobs=logprobs,
        top_logprobs=(body.top_logprobs or 0) if logprobs else None,
        tools=None if body.tools is None else [tool.as_tool for tool in body.tools],
        tool_choice=_tool_choice(body),
        parallel_tool_calls=body.parallel_tool_calls,
    )


def response_structure(body: ResponsesRequest, chat: ChatRequest) -> Structure | None:
    """Reads the form that a request asks for.

    Args:
        body: Its `text.format`.
        chat: What `chat_request` made of it.

    Returns:
        The one form that it asks for, or None if any text will do.

    Raises:
        InvalidRequestError: It asks for more than one.
    """
    free = structure_of(chat)
    text = _text_structure(body.text)
    if free is not None and text is not None:
        raise InvalidRequestError(
            f"{text.param} and {free.param} exclude each other, give one", free.param
        )
    return free or text


@contextmanager
def blaming_input() -> Generator[None, None, None]:
    """Makes errors about a chat request's messages errors about the input that they came from."""
    try:
        yield
    except InvalidRequestError as error:
        if error.param == "messages":
            error.param = "input"
        raise


def _refuse(body: ResponsesRequest) -> None:
    refuse_unsupported(body.model_extra, RESPONSES_FIELDS, hints=RESPONSES_HINTS)
    if body.text is not None:
        refuse_unsupported(body.text.model_extra, {"verbosity": ("medium",)}, "text.")
    if body.stream_options is not None:
        options = body.stream_options.model_extra
        refuse_unsupported(options, STREAM_OPTIONS_FIELDS, "stream_options.")
        if not body.stream:
            raise InvalidRequestError("stream_options needs stream to be true", "stream_options")
    later = {"allowed_callers": (["direct"],), "async": (False,), "defer_loading": (False,)}
    for index, tool in enumerate(body.tools or []):
        refuse_unsupported(tool.model_extra, later, f"tools.{index}.")


def _tool_choice(body: ResponsesRequest) -> ToolChoice | None:
    choice = body.tool_choice
    if isinstance(choice, FlatFunctionChoice):
        return NamedToolChoice(type="function", function=FunctionChoice(name=choice.name))
    # Clients say "auto" whether or not there is anything to choose.
    return None if choice == "auto" and not body.tools else choice


def _text_structure(text: TextConfig | None) -> Structure | None:
    form = None if text is None else text.format
    if isinstance(form, JSONObjectFormat):
        return Structure("json_object", param="text.format")
    if isinstance(form, FlatSchemaFormat):
        return json_schema_structure(form.schema_, "text.format")
    return None


def _messages(body: ResponsesRequest) -> list[ChatMessage]:
    messages: list[ChatMessage] = []
    if body.instructions is not None:
        messages.append(ChatMessage(role="system", content=body.instructions))
    if isinstance(body.input, str):
        return [*messages, ChatMessage(role="user", content=body.input)]
    messages += _turns(body.input)
    if not messages:
        raise InvalidRequestError("input must have a message", "input")
    return messages


def _turns(items: Sequence[InputItem]) -> list[ChatMessage]:
    """Joins calls with each other, and with what the assistant said before them."""
    turns: list[ChatMessage] = []
    called: set[str] = set()
    for index, item in enumerate(items):
        match item:
            case InputMessage():
                turns.append(ChatMessage(role=item.role, content=_content(item.content)))
            case InputCall():
                called.add(item.call_id)
                if not turns or turns[-1].role != "assistant":
                    turns.append(ChatMessage(role="assistant"))
                turns[-1].tool_calls = calls = turns[-1].tool_calls or []
                calls.append(_call(item))
            case InputCallOutput():
                if item.call_id not in called:
                    field = f"input.{index}.call_id"
                    raise InvalidRequestError(
                        f"{field}: no function_call item before it has the call_id "
                        f"{shorten(item.call_id, 80)!r}; responses are not stored, so the input "
                        "must have the calls, too",
                        field,
                    )
                turns.append(
                    ChatMessage(
                        role="tool", content=_content(item.output), tool_call_id=item.call_id
                    )
                )
            case _:
                pass
    return turns


def _call(item: InputCall) -> SentToolCall:
    function = SentFunctionCall(name=item.name, arguments=item.arguments)
    return SentToolCall(id=item.call_id, type="function", function=function)


def _content(content: str | list[InputText]) -> str | list[TextPart]:
    if isinstance(content, str):
        return content
    return [TextPart(type="text", text=part.text) for part in content] or ""
