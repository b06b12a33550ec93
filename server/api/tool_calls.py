"""Tool calls between what a parser says, what a client reads and what a template reads."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import JsonValue
from pydantic_core import from_json

from headlong.server.api.schemas_tools import (
    FunctionCall,
    FunctionCallDelta,
    SentToolCall,
    ToolCall,
    ToolCallDelta,
)
from headlong.server.api.tool_parser import (
    ArgumentsText,
    CallBegun,
    ContentText,
    ToolCallParser,
    ToolEvent,
)
from headlong.server.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion's text, told apart.

    Attributes:
        content: Text that is no call; None if there are calls alone.
        tool_calls: The calls, in order.
    """

    content: str | None
    tool_calls: tuple[ToolCall, ...]


def read_answer(parser: ToolCallParser, text: str, *, cut: bool = False) -> Answer:
    """Reads a finished completion.

    Args:
        parser: A new one.
        text: All of the completion.
        cut: The model was stopped before its end.
    """
    return collect([*parser.push(text), *parser.finish(cut=cut)])


def collect(events: Iterable[ToolEvent]) -> Answer:
    """Joins all events of a completion."""
    content: list[str] = []
    begun: list[CallBegun] = []
    arguments: list[list[str]] = []
    for event in events:
        match event:
            case ContentText():
                content.append(event.text)
            case CallBegun():
                begun.append(event)
                arguments.append([])
            case ArgumentsText():
                arguments[event.index].append(event.text)
    calls = tuple(
        ToolCall(
            id=call.id,
            type="function",
            function=FunctionCall(name=call.name, arguments="".join(pieces)),
        )
        for call, pieces in zip(begun, arguments, strict=True)
    )
    return Answer("".join(content) or (None if calls else ""), calls)


def call_delta(event: CallBegun | ArgumentsText) -> ToolCallDelta:
    """Returns what a chunk says of a call."""
    if isinstance(event, ArgumentsText):
        return ToolCallDelta(index=event.index, function=FunctionCallDelta(arguments=event.text))
    return ToolCallDelta(
        index=event.index,
        id=event.id,
        type="function",
        function=FunctionCallDelta(name=event.name, arguments=""),
    )


def template_calls(calls: Sequence[SentToolCall], field: str) -> list[dict[str, JsonValue]]:
    """Turns calls that a client sends back into what chat templates read.

    Args:
        calls: Of one message.
        field: Where in the request they lie.

    Returns:
        The calls, with their arguments as objects.

    Raises:
        InvalidRequestError: The arguments of a call are not the text of a JSON object.
    """
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {
                "name": call.function.name,
                "arguments": _object(
                    call.function.arguments, f"{field}.{index}.function.arguments"
                ),
            },
        }
        for index, call in enumerate(calls)
    ]


def _object(text: str, field: str) -> dict[str, JsonValue]:
    try:
        # Clients send the arguments of a function without parameters back as nothing at all.
        value = from_json(text or "{}", allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequestError(f"{field} is not valid JSON: {error}", field) from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{field} must be the text of a JSON object", field)
    return value
