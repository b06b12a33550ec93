"""Reads one JSON object while it is being written."""

import json
import re
from enum import Enum, auto

_SPACE = " \t\n\r"
_SCALAR_CHARS = frozenset("+-.0123456789Eaeflnrstu")
_SCALAR = re.compile(
    r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?", re.ASCII
)


class Mark(Enum):
    """What a character meant to the object, whose members are those of the outermost braces."""

    INSIDE = auto()
    KEY = auto()
    """A member's name ends with it."""
    VALUE = auto()
    """A member's value begins with it."""
    VALUE_END = auto()
    """A member's value, a string, object or array, ends with it."""
    END = auto()
    """The object ends with it."""
    BROKEN = auto()
    """It cannot stand here (RFC 8259)."""


class _Expect(Enum):
    VALUE = auto()
    VALUE_OR_END = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    COMMA_OR_END = auto()
    STRING = auto()
    ESCAPED = auto()
    HEX = auto()
    SCALAR = auto()
    NOTHING = auto()


class ObjectScanner:
    """Checks one JSON object a character at a time, its opening brace the first.

    After `Mark.END` or `Mark.BROKEN` nothing more may be pushed.
    """

    def __init__(self) -> None:
        self._expect = _Expect.VALUE
        self._closers: list[str] = []
        self._token: list[str] = []
        self._is_key = False
        self._hex_left = 0

    @property
    def string(self) -> str:
        """The last string that was a member's name or value."""
        return str(json.loads(f'"{"".join(self._token)}"'))

    def push(self, char: str) -> Mark:
        """Takes the next character and says what it meant."""
        if self._expect in (_Expect.STRING, _Expect.ESCAPED, _Expect.HEX):
            return self._string(char)
        if self._expect is _Expect.SCALAR:
            if char in _SCALAR_CHARS:
                self._token.append(char)
                return Mark.INSIDE
            if not _SCALAR.fullmatch("".join(self._token)):
                return Mark.BROKEN
            self._expect = _Expect.COMMA_OR_END
        if char in _SPACE:
            return Mark.INSIDE
        return self._structure(char)

    def _structure(self, char: str) -> Mark:
        expect = self._expect
        closes = bool(self._closers) and char == self._closers[-1]
        if closes and expect in (
            _Expect.COMMA_OR_END,
            _Expect.KEY_OR_END,
            _Expect.VALUE_OR_END,
        ):
            return self._close()
        if expect is _Expect.COMMA_OR_END and char == ",":
            in_object = self._closers[-1] == "}"
            self._expect = _Expect.KEY if in_object else _Expect.VALUE
            return Mark.INSIDE
        if expect is _Expect.COLON and char == ":":
            self._expect = _Expect.VALUE
            return Mark.INSIDE
        if expect in (_Expect.KEY, _Expect.KEY_OR_END) and char == '"':
            self._begin_string(is_key=True)
            return Mark.INSIDE
        if expect in (_Expect.VALUE, _Expect.VALUE_OR_END):
            return self._value(char)
        return Mark.BROKEN

    def _value(self, char: str) -> Mark:
        mark = Mark.VALUE if len(self._closers) == 1 else Mark.INSIDE
        if char == '"':
            self._begin_string(is_key=False)
        elif char == "{":
            self._closers.append("}")
            self._expect = _Expect.KEY_OR_END
        elif char == "[":
            self._closers.append("]")
            self._expect = _Expect.VALUE_OR_END
        elif char in _SCALAR_CHARS:
            self._token = [char]
            self._expect = _Expect.SCALAR
        else:
            return Mark.BROKEN
        return mark

    def _close(self) -> Mark:
        self._closers.pop()
        self._expect = _Expect.COMMA_OR_END if self._closers else _Expect.NOTHING
        if not self._closers:
            return Mark.END
        return Mark.VALUE_END if len(self._closers) == 1 else Mark.INSIDE

    def _begin_string(self, *, is_key: bool) -> None:
        self._token = []
        self._is_key = is_key
        self._expect = _Expect.STRING

    def _string(self, char: str) -> Mark:
        if self._expect is _Expect.STRING:
            if char == '"':
                self._expect = _Expect.COLON if self._is_key else _Expect.COMMA_OR_END
                if len(self._closers) > 1:
                    return Mark.INSIDE
                return Mark.KEY if self._is_key else Mark.VALUE_END
            if char < " ":
                return Mark.BROKEN
            if char == "\\":
                self._expect = _Expect.ESCAPED
        elif self._expect is _Expect.ESCAPED:
            if char not in '"\\/bfnrtu':
                return Mark.BROKEN
            self._expect = _Expect.HEX if char == "u" else _Expect.STRING
            self._hex_left = 4
        else:
            if char not in "0123456789abcdefABCDEF":
                return Mark.BROKEN
            self._hex_left -= 1
            if self._hex_left == 0:
                self._expect = _Expect.STRING
        self._token.append(char)
        return Mark.INSIDE
