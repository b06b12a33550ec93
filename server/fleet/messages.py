"""What a replica tells an ingress, as MessagePack: data alone, never code."""

import msgspec

from headlong.server.engine.messages import Lost, Ready, Refused, Report


class Told(msgspec.Struct, frozen=True):
    """An event of one replica's engine.

    Attributes:
        replica: Its id.
        event: Of one request, or the engine's stats alone.
    """

    replica: str
    event: Report | Refused | Lost | Ready


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Told] = msgspec.msgpack.Decoder(Told)


def encode_told(told: Told) -> bytes:
    """Writes a message."""
    return _encoder.encode(told)


def decode_told(message: bytes) -> Told:
    """Reads a message.

    Raises:
        msgspec.DecodeError: It is none.
    """
    return _decoder.decode(message)
