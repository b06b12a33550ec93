"""The engine's process: ``python -m headlong.server.engine.worker FD``, started by the server.

FD is one end of a socket pair. The first message on it says which engine to make. The process ends
when it is told to, when its engine dies, or when the other end is gone.
"""

import logging
import logging.config
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

import headlong.server.engine.quiet_libraries  # noqa: F401
from headlong.server.engine.loop import CommandQueue, EngineLoop
from headlong.server.engine.messages import (
    Command,
    Event,
    Failed,
    Fault,
    Ready,
    Start,
    decode_command,
    encode,
    read_frames,
)
from headlong.server.errors import ConfigError, HeadlongError

# This module's own name is that of every program.
logger = logging.getLogger("headlong.server.engine.worker")

EXIT_FAILURE = 1


def serve(sock: socket.socket) -> int:
    """Make the engine that is asked for on a socket, and run it.

    Args:
        sock: Connected to the server.

    Returns:
        The process's exit code.
    """
    messages = map(decode_command, read_frames(sock))
    start = next(messages, None)
    if start is None:
        return EXIT_FAILURE
    assert isinstance(start, Start)
    logging.config.dictConfig(start.log_config)
    commands: CommandQueue = queue.SimpleQueue()
    ended = threading.Event()
    threading.Thread(target=_read, args=(messages, commands, ended), daemon=True).start()

    sending = threading.Lock()

    def send(event: Event) -> None:
        try:
            with sending:
                sock.sendall(encode(event))
        except OSError:
            _leave()

    def die(error: HeadlongError) -> NoReturn:
        # The engine may wait for that rank inside a collective, for ever.
        send(Failed(Fault.of(error)))
        _leave()

    # PyTorch takes seconds to import: from here on the server's end is watched.
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    from headlong.server.engine.engine import Engine  # noqa: PLC0415

    if not start.progress_bars:
        disable_progress_bar()
    try:
        engine = Engine(start.config, on_rank_death=die)
    except HeadlongError as error:
        send(Failed(Fault.of(error)))
        return EXIT_FAILURE
    except ValueError as error:
        # A profile's or a checkpoint's own check, and for the operator to mend.
        send(Failed(Fault.of(ConfigError(str(error)))))
        return EXIT_FAILURE
    except Exception as error:
        logger.exception("the engine could not start")
        send(Failed(Fault.of(HeadlongError(f"the engine could not start: {error}"))))
        return EXIT_FAILURE
    send(Ready(engine.info()))
    loop = EngineLoop(engine, commands, send, start.faults)
    stopped = loop.run()
    ended.set()
    engine.close()
    return 0 if stopped else EXIT_FAILURE


def _read(
    messages: Iterator[Start | Command], commands: CommandQueue, ended: threading.Event
) -> None:
    """Pass commands on; when the server is gone, so is the process, whatever its engine does.

    Once the engine has ended, the process ends by itself, and the socket before it.
    """
    try:
        for message in messages:
            assert not isinstance(message, Start)
            commands.put(message)
    except ConnectionError:
        pass  # the server was killed before it had read everything
    except Exception:
        if not ended.is_set():
            logger.exception("the server's commands cannot be read")
    if not ended.is_set():
        _leave()


def _leave() -> NoReturn:
    """End at once, whatever other threads do: nobody is left to serve, or nothing to serve with."""
    os._exit(EXIT_FAILURE)


def main() -> None:
    """Runs the process."""
    # A service manager may signal all processes of the server. It is the server that decides when
    # its requests have ended, and then says so.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        code = serve(sock)
    sys.exit(code)


if __name__ == "__main__":
    main()
