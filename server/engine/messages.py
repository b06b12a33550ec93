"""What the HTTP side and the engine say to each other, as MessagePack: data alone, never code.

A frame is a length of four bytes, little-endian, and then one message.
"""

import socket
from collections.abc import Iterator
from typing import Any

import msgspec

from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.faults import Faults
from headlong.server.engine.outputs import RequestOutput
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.status import EngineInfo, EngineStats
from headlong.server.errors import (
    ConfigError,
    ContextLengthError,
    DeadlineExceededError,
    EngineDeadError,
    HeadlongError,
    InvalidRequestError,
    RequestAbortedError,
)

LENGTH_BYTES = 4
READ_BYTES = 1 << 18

_ERRORS = {
    kind.__name__: kind
    for kind in (
        HeadlongError,
        ConfigError,
        ContextLengthError,
        DeadlineExceededError,
        EngineDeadError,
        InvalidRequestError,
        RequestAbortedError,
    )
}


class Start(msgspec.Struct, frozen=True, tag="start"):
    """The first message to an engine process.

    Attributes:
        config: What to load and how.
        log_config: Of `logging.config.dictConfig`.
        faults: What is to go wrong.
        progress_bars: Whether libraries may draw them on standard error.
    """

    config: EngineConfig
    log_config: dict[str, Any]
    faults: Faults | None = None
    progress_bars: bool = True


class Add(msgspec.Struct, frozen=True, tag="add"):
    """Queue a request."""

    request: EngineRequest


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Forget a request, if it is still known."""

    request_id: str


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End after the step that runs."""


class Fault(msgspec.Struct, frozen=True):
    """An error of ours as data."""

    kind: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: HeadlongError) -> "Fault":
        """Takes an error apart."""
        # What has no class in the table travels as its nearest base that has one.
        kind = next(each.__name__ for each in type(error).__mro__ if each.__name__ in _ERRORS)
        return cls(kind, error.message, error.param)

    def error(self) -> HeadlongError:
        """Makes the error again, of the same class."""
        return _ERRORS[self.kind](self.message, self.param)


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine has started."""

    info: EngineInfo


class Report(msgspec.Struct, frozen=True, tag="report"):
    """The engine made a step, or came to rest.

    Attributes:
        outputs: What the step added; none while prompts are being computed.
        stats: How the engine does after it.
    """

    outputs: list[RequestOutput]
    stats: EngineStats


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The engine did not take a request."""

    request_id: str
    fault: Fault


class Lost(msgspec.Struct, frozen=True, tag="lost"):
    """One request is lost, as its engine was or could not be reached; others go on."""

    request_id: str
    fault: Fault


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine could not start, or died; it says nothing more."""

    fault: Fault


Command = Add | Abort | Stop
Event = Ready | Report | Refused | Lost | Failed

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Start | Command] = msgspec.msgpack.Decoder(Start | Command)
_events: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode(message: msgspec.Struct) -> bytes:
    """Makes a frame of a message.

    Raises:
        UnicodeEncodeError: A string has a lone surrogate in it.
        OverflowError: An integer does not fit 64 bits.
    """
    frame = bytearray(LENGTH_BYTES)
    _encoder.encode_into(message, frame, LENGTH_BYTES)
    frame[:LENGTH_BYTES] = (len(frame) - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little")
    return bytes(frame)


def decode_command(message: bytes) -> Start | Command:
    """Reads a message to the engine; a request is checked again when it is made.

    Raises:
        msgspec.DecodeError: It is none.
    """
    return _commands.decode(message)


def decode_event(message: bytes) -> Event:
    """Reads a message of the engine.

    Raises:
        msgspec.DecodeError: It is none.
    """
    return _events.decode(message)


def read_frames(sock: socket.socket) -> Iterator[bytes]:
    """Reads a blocking socket to its end.

    Yields:
        Each message, without its length.

    Raises:
        OSError: The other end broke off.
    """
    splitter = FrameSplitter()
    while data := sock.recv(READ_BYTES):
        yield from splitter.feed(data)


class FrameSplitter:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Takes the next bytes.

        Returns:
            Every message that is now complete, without its length.
        """
        self._buffer += data
        messages: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= LENGTH_BYTES:
            begin = start + LENGTH_BYTES
            end = begin + int.from_bytes(self._buffer[start:begin], "little")
            if len(self._buffer) < end:
                break
            messages.append(bytes(self._buffer[begin:end]))
            start = end
        del self._buffer[:start]
        return messages
