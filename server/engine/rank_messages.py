"""What rank 0 says to the other ranks, and what they answer, as MessagePack: data, never code."""

from dataclasses import fields
from typing import Literal

import msgspec
import torch

from headlong.cache.block_copy import BlockCopy
from headlong.kernels.batch import AttentionBatch, GroupBatch, SelectionBatch
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.messages import Failed, Stop

Stage = Literal["loaded", "opened"]
TableType = Literal["int32", "int64", "bool"]

_DTYPES: dict[TableType, torch.dtype] = {
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
_NAMES: dict[torch.dtype, TableType] = {dtype: name for name, dtype in _DTYPES.items()}


class Table(msgspec.Struct, frozen=True, array_like=True):
    """A tensor of integers, or of truth values."""

    dtype: TableType
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Table":
        """Takes a tensor apart."""
        return cls(_NAMES[tensor.dtype], tuple(tensor.shape), tensor.numpy().tobytes())

    def tensor(self) -> torch.Tensor:
        """Makes it again."""
        if not self.data:
            return torch.zeros(self.shape, dtype=_DTYPES[self.dtype])
        values = torch.frombuffer(bytearray(self.data), dtype=_DTYPES[self.dtype])
        return values.reshape(self.shape)


class Open(msgspec.Struct, frozen=True, tag="open"):
    """The first message to a rank.

    Attributes:
        config: What to load and how.
        rank: Which rank it is.
        store: The file where the ranks find each other.
    """

    config: EngineConfig
    rank: int
    store: str


class Forward(msgspec.Struct, frozen=True, tag="forward"):
    """Compute a step.

    Attributes:
        token_ids: int64 [total_tokens].
        positions: int64 [total_tokens].
        rows: int64 [num_rows].
        cu_seqlens_q: As in `AttentionBatch`.
        context_lens: As in `AttentionBatch`.
        groups: For each head group the tables of a `GroupBatch`, in the order of its fields.
        selection: The tables of a `SelectionBatch`, in the order of its fields; None without one.
    """

    token_ids: Table
    positions: Table
    rows: Table
    cu_seqlens_q: Table
    context_lens: Table
    groups: list[list[Table]]
    selection: list[Table] | None = None

    @classmethod
    def of(
        cls,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        rows: torch.Tensor,
    ) -> "Forward":
        """Takes the arguments of `Runner.forward` apart."""
        return cls(
            Table.of(token_ids),
            Table.of(positions),
            Table.of(rows),
            Table.of(batch.cu_seqlens_q),
            Table.of(batch.context_lens),
            [_tables(group) for group in batch.groups],
            None if batch.selection is None else _tables(batch.selection),
        )

    def batch(self) -> AttentionBatch:
        """Makes the batch again."""
        return AttentionBatch(
            cu_seqlens_q=self.cu_seqlens_q.tensor(),
            context_lens=self.context_lens.tensor(),
            groups=tuple(
                GroupBatch(*(table.tensor() for table in tables)) for tables in self.groups
            ),
            selection=(
                None
                if self.selection is None
                else SelectionBatch(*(table.tensor() for table in self.selection))
            ),
        )


def _tables(batch: GroupBatch | SelectionBatch) -> list[Table]:
    return [Table.of(getattr(batch, field.name)) for field in fields(batch)]


class CopyBlocks(msgspec.Struct, frozen=True, tag="copy"):
    """Copy whole blocks."""

    copies: list[BlockCopy]


class Reached(msgspec.Struct, frozen=True, tag="reached"):
    """How far a rank's start has come; "opened" is its end."""

    stage: Stage


RankCommand = Open | Forward | CopyBlocks | Stop
RankEvent = Reached | Failed

_commands: msgspec.msgpack.Decoder[RankCommand] = msgspec.msgpack.Decoder(RankCommand)
_events: msgspec.msgpack.Decoder[RankEvent] = msgspec.msgpack.Decoder(RankEvent)


def decode_rank_command(message: bytes) -> RankCommand:
    """Reads a message to a rank.

    Raises:
        msgspec.DecodeError: It is none.
    """
    return _commands.decode(message)


def decode_rank_event(message: bytes) -> RankEvent:
    """Reads a message of a rank.

    Raises:
        msgspec.DecodeError: It is none.
    """
    return _events.decode(message)
