"""A rank other than 0: ``python -m headlong.server.engine.follower FD``, started by rank 0.

FD is one end of a socket pair. The first message on it says which model; then the rank computes
what it is told to, as rank 0 does at the same time. The process ends when it is told to, when it
fails, or when the other end is gone.
"""

import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import headlong.server.engine.quiet_libraries  # noqa: F401
from headlong.server.engine.messages import Failed, Fault, Stop, encode, read_frames
from headlong.server.engine.rank_messages import (
    CopyBlocks,
    Forward,
    Open,
    RankCommand,
    RankEvent,
    Reached,
    decode_rank_command,
)
from headlong.server.errors import ConfigError, EngineDeadError, HeadlongError

if TYPE_CHECKING:
    from headlong.server.engine.runner import LocalRunner

EXIT_FAILURE = 1

CommandQueue = queue.SimpleQueue[RankCommand]


def serve(sock: socket.socket) -> None:
    """Be the rank that is asked for on a socket. What it cannot do ends the process.

    Args:
        sock: Connected to rank 0.
    """
    commands: CommandQueue = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sock, commands), daemon=True).start()
    order = commands.get()
    assert isinstance(order, Open)

    def send(event: RankEvent) -> None:
        try:
            sock.sendall(encode(event))
        except OSError:
            _leave()

    try:
        _follow(_open(order, send), commands)
    except Exception as error:
        send(Failed(Fault.of(_as_told(error, order.rank))))
        # A group in which a rank has failed may not come apart.
        _leave()


def _as_told(error: Exception, rank: int) -> HeadlongError:
    """A rank's error as rank 0 is to raise it."""
    match error:
        case HeadlongError():
            return error
        case ValueError():
            # A profile's or a checkpoint's own check, and for the operator to mend.
            return ConfigError(str(error))
    return EngineDeadError(f"rank {rank} failed: {type(error).__name__}: {error}")


def _open(order: Open, send: Callable[[RankEvent], None]) -> "LocalRunner":
    """Load this rank's share and allocate its arena, in step with rank 0."""
    # transformers takes seconds to import: rank 0's end is watched meanwhile.
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    from headlong.server.engine.rank_loading import load_share, open_cut  # noqa: PLC0415

    disable_progress_bar()
    model = load_share(order.config, order.rank)
    # From here on the ranks wait for each other, so all must have come so far.
    send(Reached("loaded"))
    runner = open_cut(order.config, model, Path(order.store)).runner
    send(Reached("opened"))
    return runner


def _follow(runner: "LocalRunner", commands: CommandQueue) -> None:
    """Compute what is asked for until `Stop`."""
    import torch  # noqa: PLC0415

    from headlong.server.engine.device import current  # noqa: PLC0415
    from headlong.server.engine.process_group import leave_group  # noqa: PLC0415

    with torch.inference_mode(), current(runner.model.device):
        while True:
            match commands.get():
                case Stop():
                    break
                case Forward() as step:
                    runner.forward(
                        step.token_ids.tensor(),
                        step.positions.tensor(),
                        step.batch(),
                        step.rows.tensor(),
                    )
                case CopyBlocks(copies):
                    runner.copy_blocks(copies)
                case Open():
                    raise AssertionError("a rank is opened once")
    leave_group()


def _read(sock: socket.socket, commands: CommandQueue) -> None:
    """Pass commands on; when rank 0 is gone, so is this process, whatever it computes."""
    try:
        for command in map(decode_rank_command, read_frames(sock)):
            commands.put(command)
    except OSError:
        pass  # rank 0 was killed before it had read everything
    _leave()


def _leave() -> NoReturn:
    """End at once, even inside a collective that the other ranks have left."""
    os._exit(EXIT_FAILURE)


def main() -> None:
    """Runs the process."""
    # A service manager may signal all processes of the server; rank 0 says when to end.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        serve(sock)


if __name__ == "__main__":
    main()
