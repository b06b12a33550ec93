"""An engine in a process of its own.

HTTP and steps then share no interpreter lock, and the server outlives its engine by as long as it
takes to end every stream with an error.
"""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.faults import Faults
from headlong.server.engine.messages import (
    LENGTH_BYTES,
    Command,
    Event,
    Failed,
    Fault,
    FrameSplitter,
    Ready,
    Start,
    Stop,
    decode_event,
    encode,
)
from headlong.server.engine.status import EngineInfo
from headlong.server.engine_link import EngineLink
from headlong.server.errors import EngineDeadError

WORKER = "headlong.server.engine.worker"
STOP_TIMEOUT_S = 10.0
REAP_TIMEOUT_S = 2.0


class EngineProcess(EngineLink):
    """Starts an engine and waits, blocking, until it is ready.

    Args:
        config: What to load and how.
        log_config: How the process logs, for `logging.config.dictConfig`.
        faults: What is to go wrong.
        progress_bars: Whether libraries may draw them on standard error, among the logs.

    Raises:
        ConfigError: The engine cannot start with this configuration.
        HeadlongError: It failed to start for another reason.
        EngineDeadError: Its process ended meanwhile.
    """

    def __init__(
        self,
        config: EngineConfig,
        log_config: Mapping[str, Any],
        faults: Faults | None = None,
        *,
        progress_bars: bool = True,
    ) -> None:
        self._closing = False
        self._transport: asyncio.Transport | None = None
        self._death: asyncio.Task[None] | None = None
        self._sock, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: what lies in the current folder is no module of ours.
                [sys.executable, "-P", "-m", WORKER, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__,
                # Ctrl-C is for the server alone, which then lets its requests finish.
                start_new_session=True,
            )
        try:
            self._sock.sendall(encode(Start(config, dict(log_config), faults, progress_bars)))
            # Imported while the engine loads.
            from headlong.server.engine.tokenizer import load_tokenizer  # noqa: PLC0415

            self.info = self._wait_ready()
            self.tokenizer = load_tokenizer(config)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    async def start(self, on_event: Callable[[Event], None]) -> None:
        """Connect the process's reports to the running event loop."""
        loop = asyncio.get_running_loop()

        def lost() -> None:
            if not self._closing:
                self._death = loop.create_task(self._tell_death(on_event))

        self._sock.setblocking(False)
        self._transport, _ = await loop.create_connection(
            lambda: _EventProtocol(on_event, lost), sock=self._sock
        )

    def send(self, command: Command) -> None:
        """Pass a command on; what the process does not read yet waits here."""
        frame = encode(command)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    async def close(self) -> None:
        """Stop the process after its current step, or by force if that takes long."""
        if not self._closing:
            self.send(Stop())
            self._closing = True
            await asyncio.to_thread(self._reap, STOP_TIMEOUT_S)
        self.kill()
        if self._transport is not None:
            self._transport.abort()

    def kill(self) -> None:
        """End the process."""
        self._closing = True
        self._process.kill()
        self._reap(0)
        if self._transport is None:
            self._sock.close()

    def _wait_ready(self) -> EngineInfo:
        header = self._sock.recv(LENGTH_BYTES, socket.MSG_WAITALL)
        length = int.from_bytes(header, "little")
        message = self._sock.recv(length, socket.MSG_WAITALL) if header else b""
        if not message:
            raise EngineDeadError(f"{self._describe_end()} before it was ready")
        match decode_event(message):
            case Ready(info):
                return info
            case Failed(fault):
                self._reap(REAP_TIMEOUT_S)
                raise fault.error()
            case other:
                raise EngineDeadError(f"the engine process began with {type(other).__name__}")

    async def _tell_death(self, on_event: Callable[[Event], None]) -> None:
        message = await asyncio.to_thread(self._describe_end)
        on_event(Failed(Fault.of(EngineDeadError(message))))

    def _describe_end(self) -> str:
        """Make sure that the process has ended, and say how."""
        self._reap(REAP_TIMEOUT_S)
        # Without its connection it is of no use even if it still runs.
        self._process.kill()
        self._reap(REAP_TIMEOUT_S)
        code = self._process.returncode
        if code is None:
            return "the engine process lost its connection"
        if code >= 0:
            return f"the engine process ended with exit code {code}"
        return f"the engine process was killed by {_signal_name(-code)}"

    def _reap(self, timeout_s: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)


class _EventProtocol(asyncio.Protocol):
    def __init__(self, on_event: Callable[[Event], None], on_lost: Callable[[], None]) -> None:
        self._on_event = on_event
        self._on_lost = on_lost
        self._splitter = FrameSplitter()

    def data_received(self, data: bytes) -> None:
        for message in self._splitter.feed(data):
            self._on_event(decode_event(message))

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
