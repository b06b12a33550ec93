"""Rank 0's end of another rank: its process, and what it says."""

import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.messages import Failed, Stop, encode, read_frames
from headlong.server.engine.rank_messages import (
    Open,
    RankEvent,
    Reached,
    Stage,
    decode_rank_event,
)
from headlong.server.errors import EngineDeadError, HeadlongError

FOLLOWER = "headlong.server.engine.follower"
STOP_TIMEOUT_S = 10.0
REAP_TIMEOUT_S = 2.0

OnDeath = Callable[[HeadlongError], None]


class FollowerLink:
    """Starts a rank in a process of its own, which ends with this one.

    Args:
        config: What it loads and how.
        rank: Which one it is.
        store: The file where the ranks find each other.
        on_death: Called on a thread of the link's own when the rank has ended unasked.
    """

    def __init__(
        self, config: EngineConfig, rank: int, store: Path, on_death: OnDeath | None
    ) -> None:
        self.rank = rank
        self._on_death = on_death
        self._closing = False
        self._events: queue.SimpleQueue[RankEvent | HeadlongError] = queue.SimpleQueue()
        self._death: HeadlongError | None = None
        self._sock, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: what lies in the current folder is no module of ours.
                [sys.executable, "-P", "-m", FOLLOWER, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__,
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.send(encode(Open(config, rank, str(store))))

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def send(self, frame: bytes) -> None:
        """Pass an encoded command on.

        Raises:
            HeadlongError: The rank has ended.
        """
        try:
            self._sock.sendall(frame)
        except OSError as error:
            raise self.death(REAP_TIMEOUT_S) or self._ended() from error

    def wait(self, stage: Stage) -> None:
        """Wait until the rank's start has come so far.

        Raises:
            HeadlongError: It failed, as the error says, or ended.
        """
        event = self._events.get()
        if isinstance(event, HeadlongError):
            raise event
        assert event == Reached(stage)

    def death(self, timeout_s: float) -> HeadlongError | None:
        """Why the rank ended; None if it still runs after so many seconds."""
        self._reader.join(timeout_s)
        return self._death

    def stop(self) -> None:
        """Let the rank end once it has computed what it was told to."""
        self._closing = True
        with suppress(OSError):
            self._sock.sendall(encode(Stop()))

    def close(self) -> None:
        """Wait for the end of a rank that was stopped, or end it if that takes long."""
        self._reap(STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End the process at once."""
        self._closing = True
        self._process.kill()
        self._reap(REAP_TIMEOUT_S)
        self._reader.join(REAP_TIMEOUT_S)
        self._sock.close()

    def _read(self) -> None:
        """Take in what the rank says, until it has ended."""
        death: HeadlongError | None = None
        with suppress(OSError):
            for event in map(decode_rank_event, read_frames(self._sock)):
                if isinstance(event, Failed):
                    death = event.fault.error()
                else:
                    self._events.put(event)
        self._death = self._ended() if death is None else death
        self._events.put(self._death)
        if self._on_death is not None and not self._closing:
            self._on_death(self._death)

    def _ended(self) -> EngineDeadError:
        self._reap(REAP_TIMEOUT_S)
        code = self._process.returncode
        if code is None:
            how = "lost its connection"
        else:
            how = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return EngineDeadError(f"the process of rank {self.rank} {how}")

    def _reap(self, timeout_s: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
