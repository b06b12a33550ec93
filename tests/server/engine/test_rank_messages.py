"""What ranks say to each other arrives as it was."""

from dataclasses import fields

import msgspec
import pytest
import torch

from headlong.cache.block_copy import BlockCopy
from headlong.kernels.batch import AttentionBatch, GroupBatch, SelectionBatch
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.messages import LENGTH_BYTES, Failed, Fault, Stop, encode
from headlong.server.engine.rank_messages import (
    CopyBlocks,
    Forward,
    Open,
    RankCommand,
    Reached,
    Table,
    decode_rank_command,
    decode_rank_event,
)


def arrived(message: RankCommand) -> RankCommand:
    return decode_rank_command(encode(message)[LENGTH_BYTES:])


@pytest.mark.parametrize(
    "message",
    [
        Open(EngineConfig(model="m", tensor_parallel_size=2), 1, "/tmp/store"),
        CopyBlocks([BlockCopy(group=1, source=2, target=3)]),
        Stop(),
    ],
)
def test_commands_arrive_as_they_were(message: RankCommand) -> None:
    assert arrived(message) == message


@pytest.mark.parametrize("message", [Reached("loaded"), Failed(Fault("ConfigError", "m", "p"))])
def test_events_arrive_as_they_were(message: Reached | Failed) -> None:
    assert decode_rank_event(encode(message)[LENGTH_BYTES:]) == message


@pytest.mark.parametrize("shape", [(0,), (3,), (2, 0), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool])
def test_a_tensor_arrives_as_it_was(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randint(-(2**31), 2**31, shape)
    tensor = tensor > 0 if dtype == torch.bool else tensor.to(dtype)
    again = Table.of(tensor).tensor()
    assert torch.equal(again, tensor)
    assert (again.dtype, again.shape) == (dtype, tensor.shape)


@pytest.mark.parametrize("chooses", [False, True])
def test_a_batch_arrives_as_it_was(chooses: bool) -> None:
    def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(0, 2**31, shape).to(dtype)

    groups = tuple(
        GroupBatch(
            block_tables=numbers(2, width),
            table_lens=numbers(2),
            sink_blocks=numbers(2),
            window_starts=numbers(2),
            sink_sizes=numbers(2),
            window_sizes=numbers(2),
            slot_mapping=numbers(7, dtype=torch.int64),
        )
        for width in (5, 0)
    )
    selection = SelectionBatch(numbers(2), numbers(2), torch.tensor([True, False]))
    batch = AttentionBatch(numbers(3), numbers(2), groups, selection if chooses else None)
    tokens, positions, rows = (numbers(count, dtype=torch.int64) for count in (7, 7, 0))
    message = arrived(Forward.of(tokens, positions, batch, rows))
    assert isinstance(message, Forward)
    assert torch.equal(message.token_ids.tensor(), tokens)
    assert torch.equal(message.positions.tensor(), positions)
    assert message.rows.tensor().shape == (0,)
    again = message.batch()
    assert torch.equal(again.cu_seqlens_q, batch.cu_seqlens_q)
    assert torch.equal(again.context_lens, batch.context_lens)
    for found, group in zip(again.groups, groups, strict=True):
        for field in fields(GroupBatch):
            assert torch.equal(getattr(found, field.name), getattr(group, field.name))
    if not chooses:
        assert again.selection is None
        return
    for field in fields(SelectionBatch):
        found_tensor = getattr(again.selection, field.name)
        assert torch.equal(found_tensor, getattr(selection, field.name))
        assert found_tensor.dtype == getattr(selection, field.name).dtype


def test_what_is_no_message_is_refused() -> None:
    for message in (b"", b"\x80", msgspec.msgpack.encode({"type": "abort", "request_id": "r"})):
        with pytest.raises(msgspec.DecodeError):
            decode_rank_command(message)
