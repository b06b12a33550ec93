"""Finds the calls in a model's answer while it is being written."""

import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass

from headlong.server.api.json_scanner import Mark, ObjectScanner
from headlong.server.api.tool_styles import ToolStyle


@dataclass(frozen=True, slots=True)
class ContentText:
    """More text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """The model calls a function; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsText:
    """More of the JSON text of a call's arguments, as the model wrote it."""

    index: int
    text: str


ToolEvent = ContentText | CallBegun | ArgumentsText


class ToolCallParser:
    """Reads the text of one completion.

    Each character is looked at once, and what it comes to depends on those before it alone: the
    events say the same however the text is cut into pieces.

    A call of a function that was not offered, and JSON that is none, is ordinary text. So is what
    follows where a call breaks off after its name was told. White space around calls is dropped.

    Args:
        style: How the model writes calls.
        names: The functions that it may call.
    """

    def __init__(self, style: ToolStyle, names: Collection[str]) -> None:
        self._style = style
        self._names = names
        # Those of a call's object, with what each of them is.
        self._members = {each: each for each in ("name", "type", "id")}
        self._members |= dict.fromkeys(style.arguments_keys, "arguments")
        # Where a call may begin anywhere, text is searched; else the answer's head decides.
        self._between: _Step = self._seek if style.end else self._plain
        self._step: _Step = self._seek if style.end else self._open
        self._num_calls = 0
        # What may yet turn out to be part of a call, and how much of a mark it ends with.
        self._held: list[str] = []
        self._matched = 0
        self._call = _Call()
        self._events: list[ToolEvent] = []
        self._pieces: list[str] = []
        self._pieces_call: int | None = None

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._num_calls

    def push(self, text: str) -> list[ToolEvent]:
        """Takes the next piece of the text.

        Returns:
            What is certain now.
        """
        for char in text:
            self._step(char)
        return self._take()

    def finish(self, *, cut: bool = False) -> list[ToolEvent]:
        """Ends the text.

        Args:
            cut: The model was stopped before its end: a call that it had begun is no text.

        Returns:
            What was held back.
        """
        if cut and self._step in (self._gap, self._read):
            self._held = []
        held = "".join(self._held)
        # Around and after calls these are form, not text.
        formal = self._step in (self._close, self._separate)
        if self._num_calls and (formal or not held.strip()):
            self._held = []
        self._release()
        return self._take()

    def _seek(self, char: str) -> None:
        """Text, in which a mark may open a call."""
        begin = self._style.begin
        if char == begin[self._matched]:
            self._hold(char)
            if self._matched == len(begin):
                self._step = self._gap
        elif self._matched == 0 and char.isspace():
            self._held.append(char)
        else:
            self._release()
            if char == begin[0]:
                self._hold(char)
            elif char.isspace():
                self._held.append(char)
            else:
                self._add(None, char)

    def _open(self, char: str) -> None:
        """The head of an answer that may be calls as a whole."""
        begin = self._style.begin
        if self._matched < len(begin) and char == begin[self._matched]:
            self._hold(char)
        elif 0 < self._matched < len(begin):
            self._abandon(char)
        else:
            self._gap(char)

    def _gap(self, char: str) -> None:
        """Before a call's brace."""
        if char == "{":
            self._call = _Call()
            self._step = self._read
            self._read(char)
        elif char.isspace():
            self._held.append(char)
        else:
            self._abandon(char)

    def _separate(self, char: str) -> None:
        """Between calls that nothing encloses."""
        if char == ";":
            self._held.append(char)
        else:
            self._gap(char)

    def _close(self, char: str) -> None:
        """After a call, before the mark that closes it."""
        end = self._style.end
        if char == end[self._matched]:
            self._hold(char)
            if self._matched == len(end):
                self._forget_held()
                self._step = self._between
        elif self._matched == 0 and char.isspace():
            self._held.append(char)
        else:
            # The model left the mark out; what came in its place may open the next call.
            held = [*self._held, char]
            self._forget_held()
            self._step = self._between
            for each in held:
                self._step(each)

    def _plain(self, char: str) -> None:
        self._add(None, char)

    def _read(self, char: str) -> None:
        """Inside a call's object."""
        call = self._call
        mark = call.scanner.push(char)
        if mark is Mark.BROKEN:
            self._abandon(char)
            return
        if mark is Mark.VALUE and call.member == "arguments":
            call.in_arguments = True
            if char == "{" and call.name is not None:
                self._begin_call(call.name)
        if call.in_arguments:
            if call.begun:
                self._add(self._num_calls - 1, char)
            else:
                call.arguments.append(char)
                self._held.append(char)
        else:
            self._held.append(char)
        if not self._follow(mark, char):
            self._abandon()

    def _follow(self, mark: Mark, char: str) -> bool:
        """Keeps account of the members; False if this is no call after all."""
        call = self._call
        if mark is Mark.KEY:
            call.member = self._members.get(call.scanner.string, "")
            known = call.member not in call.seen
            call.seen.add(call.member)
            return known
        if mark is Mark.VALUE:
            if call.in_arguments:
                return char == "{"
            return call.member != "name" or char == '"'
        if mark is Mark.VALUE_END:
            call.in_arguments = False
            if call.member == "name":
                call.name = call.scanner.string
                if call.name not in self._names:
                    return False
                if call.arguments:
                    self._begin_call(call.name)
                    for each in call.arguments:
                        self._add(self._num_calls - 1, each)
        if mark is Mark.END:
            if not call.begun:
                return False
            self._forget_held()
            self._step = self._close if self._style.end else self._separate
        return True

    def _begin_call(self, name: str) -> None:
        self._forget_held()
        self._call.begun = True
        self._flush()
        self._events.append(CallBegun(self._num_calls, f"call_{secrets.token_hex(12)}", name))
        self._num_calls += 1

    def _abandon(self, char: str = "") -> None:
        """What is held is text, and so is what follows, until the next call."""
        self._release()
        self._step = self._between
        for each in char:
            self._step(each)

    def _hold(self, char: str) -> None:
        self._held.append(char)
        self._matched += 1

    def _forget_held(self) -> None:
        self._held = []
        self._matched = 0

    def _release(self) -> None:
        for each in self._held:
            self._add(None, each)
        self._forget_held()

    def _add(self, call: int | None, char: str) -> None:
        """Add a character to a call's arguments, or to the text."""
        if call != self._pieces_call:
            self._flush()
            self._pieces_call = call
        self._pieces.append(char)

    def _flush(self) -> None:
        if self._pieces:
            text = "".join(self._pieces)
            call = self._pieces_call
            self._events.append(ContentText(text) if call is None else ArgumentsText(call, text))
            self._pieces = []

    def _take(self) -> list[ToolEvent]:
        self._flush()
        events, self._events = self._events, []
        return events


_Step = Callable[[str], None]


class _Call:
    """What is known of the call that is being read."""

    def __init__(self) -> None:
        self.scanner = ObjectScanner()
        self.member = ""
        self.seen = {""}
        self.name: str | None = None
        self.in_arguments = False
        self.arguments: list[str] = []
        self.begun = False
