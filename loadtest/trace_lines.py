r"""Reads a trace: a JSON object a line, each a request with the time at which it came.

Three shapes, one for a whole file::

    {"timestamp": 0.5, "prompt": "Once", "max_tokens": 16}
    {"timestamp": 0.5, "messages": [{"role": "user", "content": "Hello"}], "expected": "Hi"}
    {"timestamp": 500, "input_length": 700, "output_length": 9, "hash_ids": [0, 7]}

The last is Mooncake's (https://github.com/kvcache-ai/Mooncake): an id stands for a block of the
prompt's tokens, requests whose ids begin alike share that prefix, and timestamps are milliseconds.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pydantic import JsonValue

from headlong.loadtest.workload import ROLES, Message

BODY_FIELDS = ("prompt", "messages", "input_length")
LENGTH_FIELDS = ("max_tokens", "output_length")
MAX_LENGTH_TOKENS = 100_000_000
"""Longest prompt or answer that a line may ask for."""

_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"


@dataclass(frozen=True, slots=True)
class TraceShape:
    """Which fields a file's requests have.

    Attributes:
        body: The one of `BODY_FIELDS` that gives the prompt.
        length: The one of `LENGTH_FIELDS` that gives the answer's length; None if none does.
    """

    body: str
    length: str | None


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One line of a trace.

    Attributes:
        shape: Which of the fields below it has.
        timestamp: When it came, in the file's unit; at least 0.
        messages: Those of a chat, the last the user's; a prompt is the only message.
        input_length: Tokens of a prompt of which no more is known; else 0.
        hash_ids: Of that prompt's blocks of tokens.
        output_length: Tokens of the answer, or the most it may have; None if the line does not say.
        expected: What the answer must contain; None if it is not judged.
    """

    shape: TraceShape
    timestamp: float
    messages: tuple[Message, ...] = ()
    input_length: int = 0
    hash_ids: tuple[int | str, ...] = ()
    output_length: int | None = None
    expected: str | None = None


def read_trace(path: Path, block_size: int, limit: int | None = None) -> list[TraceRequest]:
    """Reads the requests of a trace; blank lines are skipped, fields of other names left alone.

    Args:
        path: UTF-8 text.
        block_size: Tokens that a hash id stands for.
        limit: Most requests to read; None reads all.

    Raises:
        ValueError: If the file cannot be read, holds no request, or a line is not what it should
            be; it names the file and the line.
    """
    requests: list[TraceRequest] = []
    for number, line in islice(_lines(path), limit):
        try:
            request = _parse_line(line, block_size)
            if requests:
                _check_follows(request, requests[-1])
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        requests.append(request)
    if not requests:
        raise ValueError(f"{path}: holds no request")
    return requests


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers from 1 and texts of the lines that are not blank."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8").removeprefix(_BOM if number == 1 else "").strip()
                if line:
                    yield number, line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: is not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def _check_follows(request: TraceRequest, before: TraceRequest) -> None:
    if request.timestamp < before.timestamp:
        raise ValueError(
            f"timestamp {request.timestamp} is before the last one's, {before.timestamp}; a trace "
            "is sorted by time"
        )
    if request.shape != before.shape:
        raise ValueError(
            f"has {_describe(request.shape)}, where the lines before have {_describe(before.shape)}"
        )


def _describe(shape: TraceShape) -> str:
    return f"{shape.body} and {shape.length}" if shape.length else f"{shape.body} and no length"


def _parse_line(line: str, block_size: int) -> TraceRequest:
    fields = _parse_object(line)
    body = _only_field(fields, BODY_FIELDS)
    length = _only_field(fields, LENGTH_FIELDS)
    if body is None:
        raise ValueError(f"has none of {', '.join(BODY_FIELDS)}")
    input_length = _length(fields, "input_length") if body == "input_length" else 0
    return TraceRequest(
        TraceShape(body, length),
        _timestamp(fields),
        _messages(fields, body),
        input_length,
        _hash_ids(fields, input_length, block_size) if body == "input_length" else (),
        _length(fields, length) if length else None,
        _text(fields, "expected") if fields.get("expected") is not None else None,
    )


def _only_field(fields: dict[str, JsonValue], names: tuple[str, ...]) -> str | None:
    """Returns which of several fields a line has, if any."""
    present = [name for name in names if name in fields]
    if len(present) > 1:
        raise ValueError(f"has {' and '.join(present)}, of which only one is allowed")
    return present[0] if present else None


def _parse_object(line: str) -> dict[str, JsonValue]:
    try:
        value: JsonValue = json.loads(line, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("is not JSON that can be read: nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not a JSON object")
    return value


def _refuse_constant(name: str) -> JsonValue:
    raise ValueError(f"holds {name}, which is not a finite number")


def _field(fields: dict[str, JsonValue], name: str) -> JsonValue:
    if name not in fields:
        raise ValueError(f"has no {name}")
    return fields[name]


def _timestamp(fields: dict[str, JsonValue]) -> float:
    value = _field(fields, "timestamp")
    # A bool is an int to Python, and an int can be larger than any float.
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        raise ValueError(f"timestamp must be a finite number, got {_shown(value)}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"timestamp must be at least 0 and finite, got {value}")
    return float(value)


def _length(fields: dict[str, JsonValue], name: str) -> int:
    value = _field(fields, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number of tokens, got {_shown(value)}")
    if not 1 <= value <= MAX_LENGTH_TOKENS:
        raise ValueError(f"{name} must be 1 to {MAX_LENGTH_TOKENS}, got {_shown(value)}")
    return value


def _text(fields: dict[str, JsonValue], name: str) -> str:
    value = _field(fields, name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a text that is not empty, got {_shown(value)}")
    _check_encodes(name, value)
    return value


def _check_encodes(name: str, text: str) -> None:
    """Refuses half of a surrogate pair, which JSON can escape but no request can carry."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} holds half of a surrogate pair")


def _messages(fields: dict[str, JsonValue], body: str) -> tuple[Message, ...]:
    if body == "input_length":
        return ()
    if body == "prompt":
        return (Message("user", _text(fields, "prompt")),)
    value = fields["messages"]
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages must be a list that is not empty, got {_shown(value)}")
    messages = tuple(_message(each, index) for index, each in enumerate(value))
    if messages[-1].role != "user":
        raise ValueError(f"the last message must be the user's, is the {messages[-1].role}'s")
    return messages


def _message(value: JsonValue, index: int) -> Message:
    name = f"messages[{index}]"
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {_shown(value)}")
    content = value.get("content")
    if not isinstance(content, str):
        raise ValueError(f"{name}.content must be a text, got {_shown(content)}")
    _check_encodes(f"{name}.content", content)
    for role in ROLES:
        if value.get("role") == role:
            return Message(role, content)
    raise ValueError(
        f"{name}.role must be one of {', '.join(ROLES)}, got {_shown(value.get('role'))}"
    )


def _hash_ids(
    fields: dict[str, JsonValue], input_length: int, block_size: int
) -> tuple[int | str, ...]:
    value = _field(fields, "hash_ids")
    if not isinstance(value, list):
        raise ValueError(f"hash_ids must be a list, got {_shown(value)}")
    ids: list[int | str] = []
    for each in value:
        if isinstance(each, bool) or not isinstance(each, int | str):
            raise ValueError(f"hash_ids must be whole numbers or texts, got {_shown(each)}")
        ids.append(each)
    blocks = -(-input_length // block_size)
    if len(ids) != blocks:
        raise ValueError(
            f"{input_length} tokens are {blocks} blocks of {block_size}, "
            f"but hash_ids has {len(ids)}"
        )
    return tuple(ids)


def _shown(value: JsonValue) -> str:
    """The start of a value as JSON."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
