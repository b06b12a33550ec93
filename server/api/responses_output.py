"""Builds the output of a response item by item, while the model writes."""

from typing import Literal

from headlong.server.api.generation import Delta, new_id
from headlong.server.api.logprobs import chat_logprobs
from headlong.server.api.schemas_chat import TokenAlternative
from headlong.server.api.schemas_responses_output import (
    ArgumentsDelta,
    ArgumentsDone,
    ItemEvent,
    ItemStatus,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputText,
    PartEvent,
    ResponseEvent,
    TextAlternative,
    TextDelta,
    TextDone,
    TextLogprob,
)
from headlong.server.api.tool_parser import (
    ArgumentsText,
    CallBegun,
    ContentText,
    ToolCallParser,
    ToolEvent,
)
from headlong.server.engine.outputs import PositionLogprobs

EndStatus = Literal["completed", "incomplete"]


class OutputBuilder:
    """The items of one response.

    Text between calls is a message; an answer without calls is one message, even if it is empty.
    The log probabilities of tokens that show as no text, such as the end, belong to the text that
    follows them, or to the last message. Those of calls are not told.

    Args:
        parser: Tells calls from text; None if there can be none.
    """

    def __init__(self, parser: ToolCallParser | None) -> None:
        self._parser = parser
        self._done: list[OutputItem] = []
        self._open: _OpenMessage | _OpenCall | None = None
        self._untold: list[TextLogprob] = []

    @property
    def items(self) -> list[OutputItem]:
        """The items so far; one that the model is at is incomplete."""
        return self._done if self._open is None else [*self._done, self._open.item("incomplete")]

    def push(self, delta: Delta) -> list[ResponseEvent]:
        """Takes what the model wrote.

        Returns:
            What it changes, as events that are yet without numbers.
        """
        self._untold += _text_logprobs(delta.logprobs or ())
        events: list[ResponseEvent] = []
        for event in self._read(delta):
            match event:
                case ContentText():
                    events += self._say(event.text)
                case CallBegun():
                    events += self._close("completed")
                    call = _OpenCall(len(self._done), event.id, event.name)
                    self._open, self._untold = call, []
                    events += call.begin()
                case ArgumentsText():
                    assert isinstance(self._open, _OpenCall)
                    self._untold = []
                    events.append(self._open.add(event.text))
        if delta.finish_reason is not None:
            if not self.items or (self._untold and isinstance(self._open, _OpenMessage)):
                events += self._say("")
            events += self._close("completed" if delta.finish_reason == "stop" else "incomplete")
        return events

    def _read(self, delta: Delta) -> list[ToolEvent]:
        if self._parser is None:
            return [ContentText(delta.text)] if delta.text else []
        events = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            events += self._parser.finish(cut=delta.finish_reason == "length")
        return events

    def _say(self, text: str) -> list[ResponseEvent]:
        events: list[ResponseEvent] = []
        if not isinstance(self._open, _OpenMessage):
            events += self._close("completed")
            self._open = _OpenMessage(len(self._done))
            events += self._open.begin()
        logprobs, self._untold = self._untold, []
        if text or logprobs:
            events.append(self._open.add(text, logprobs))
        return events

    def _close(self, status: EndStatus) -> list[ResponseEvent]:
        if self._open is None:
            return []
        events = self._open.end(status)
        self._done.append(self._open.item(status))
        self._open = None
        return events


class _OpenMessage:
    def __init__(self, output_index: int) -> None:
        self._id = new_id("msg_")
        self._output_index = output_index
        self._pieces: list[str] = []
        self._logprobs: list[TextLogprob] = []

    def item(self, status: ItemStatus) -> OutputMessage:
        return self._message(status, [self._part()])

    def begin(self) -> list[ResponseEvent]:
        return [
            ItemEvent(
                type="response.output_item.added",
                output_index=self._output_index,
                item=self._message("in_progress", []),
            ),
            self._part_event("response.content_part.added"),
        ]

    def add(self, text: str, logprobs: list[TextLogprob]) -> ResponseEvent:
        self._pieces.append(text)
        self._logprobs += logprobs
        return TextDelta(
            type="response.output_text.delta",
            output_index=self._output_index,
            item_id=self._id,
            content_index=0,
            delta=text,
            logprobs=logprobs,
        )

    def end(self, status: EndStatus) -> list[ResponseEvent]:
        part = self._part()
        return [
            TextDone(
                type="response.output_text.done",
                output_index=self._output_index,
                item_id=self._id,
                content_index=0,
                text=part.text,
                logprobs=part.logprobs,
            ),
            self._part_event("response.content_part.done"),
            ItemEvent(
                type="response.output_item.done",
                output_index=self._output_index,
                item=self.item(status),
            ),
        ]

    def _message(self, status: ItemStatus, content: list[OutputText]) -> OutputMessage:
        return OutputMessage(
            id=self._id, type="message", status=status, role="assistant", content=content
        )

    def _part(self) -> OutputText:
        return OutputText(
            type="output_text",
            text="".join(self._pieces),
            annotations=[],
            logprobs=list(self._logprobs),
        )

    def _part_event(self, name: str) -> PartEvent:
        return PartEvent(
            type=name,
            output_index=self._output_index,
            item_id=self._id,
            content_index=0,
            part=self._part(),
        )


class _OpenCall:
    def __init__(self, output_index: int, call_id: str, name: str) -> None:
        self._id = new_id("fc_")
        self._output_index = output_index
        self._call_id = call_id
        self._name = name
        self._pieces: list[str] = []

    def item(self, status: ItemStatus) -> OutputCall:
        return OutputCall(
            id=self._id,
            type="function_call",
            status=status,
            call_id=self._call_id,
            name=self._name,
            arguments="".join(self._pieces),
        )

    def begin(self) -> list[ResponseEvent]:
        return [
            ItemEvent(
                type="response.output_item.added",
                output_index=self._output_index,
                item=self.item("in_progress"),
            )
        ]

    def add(self, text: str) -> ResponseEvent:
        self._pieces.append(text)
        return ArgumentsDelta(
            type="response.function_call_arguments.delta",
            output_index=self._output_index,
            item_id=self._id,
            delta=text,
        )

    def end(self, status: EndStatus) -> list[ResponseEvent]:
        item = self.item(status)
        return [
            ArgumentsDone(
                type="response.function_call_arguments.done",
                output_index=self._output_index,
                item_id=self._id,
                name=self._name,
                arguments=item.arguments,
            ),
            ItemEvent(type="response.output_item.done", output_index=self._output_index, item=item),
        ]


def _text_logprobs(positions: tuple[PositionLogprobs, ...]) -> list[TextLogprob]:
    return [
        TextLogprob(
            token=each.token,
            logprob=each.logprob,
            bytes=each.bytes or [],
            top_logprobs=[_alternative(other) for other in each.top_logprobs],
        )
        for each in chat_logprobs(positions).content
    ]


def _alternative(token: TokenAlternative) -> TextAlternative:
    return TextAlternative(token=token.token, logprob=token.logprob, bytes=token.bytes or [])
