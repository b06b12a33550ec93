"""How many requests may wait, counted before any work is done for them."""

import math
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from headlong.server.errors import InvalidRequestError, QueueFullError

MAX_RETRY_AFTER_S = 60
UNKNOWN_RETRY_AFTER_S = 5
RECENT_DEPARTURES = 64
RECENT_S = 60.0


class Ticket:
    """Places in the queue, held by one HTTP request; as a context manager it releases them."""

    def __init__(self, gate: "QueueGate", num_places: int) -> None:
        self._gate = gate
        self._num_places = num_places

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def give_back_one(self) -> None:
        """Give one place back, if any is left."""
        if self._num_places:
            self._num_places -= 1
            self._gate.leave(1)

    def release(self) -> None:
        """Give back all places that are left."""
        if self._num_places:
            self._gate.leave(self._num_places)
            self._num_places = 0


class QueueGate:
    """Bounds the requests that are being tokenized or wait; running ones have left.

    Args:
        max_num_queued: Most of them.
        clock: In seconds.

    Attributes:
        num_queued: Those there are.
    """

    def __init__(self, max_num_queued: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_num_queued = max_num_queued
        self._clock = clock
        self._departures: deque[float] = deque(maxlen=RECENT_DEPARTURES)
        self.num_queued = 0

    def enter(self, count: int) -> Ticket:
        """Take places.

        Args:
            count: Engine requests that an HTTP request will make.

        Raises:
            QueueFullError: There are not as many left, and when to try again.
            InvalidRequestError: There never are as many.
        """
        limit = self._max_num_queued
        if count > limit:
            raise InvalidRequestError(
                f"the request has {count} prompts, and no more than {limit} may wait", "prompt"
            )
        if self.num_queued + count > limit:
            raise QueueFullError(
                f"{self.num_queued} requests wait, and no more than {limit} may",
                self.retry_after_s,
            )
        self.num_queued += count
        return Ticket(self, count)

    def leave(self, count: int) -> None:
        """Note that requests started, or were given up."""
        self.num_queued -= count
        self._departures.extend([self._clock()] * min(count, RECENT_DEPARTURES))

    @property
    def retry_after_s(self) -> int:
        """Seconds in which the present queue is gone at the recent rate of departures, 1 to 60.

        5 where nothing left lately: a server that was quiet until now may soon have places.
        Not the time until one place is free: all that were turned away would come back at once.
        """
        now = self._clock()
        recent = [each for each in self._departures if now - each <= RECENT_S]
        if not recent:
            return UNKNOWN_RETRY_AFTER_S
        rate = len(recent) / max(now - recent[0], 1.0)
        return min(max(math.ceil(self.num_queued / rate), 1), MAX_RETRY_AFTER_S)
