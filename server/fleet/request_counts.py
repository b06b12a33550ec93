"""How many requests each replica has, as the one who sends them knows it."""

from collections import Counter
from collections.abc import Callable

CHOSEN_S = 5.0
"""Seconds after which a request that was to go somewhere, and has not, went nowhere."""


class RequestCounts:
    """Counts requests from the moment that a replica is chosen for them.

    Many are chosen for before the first one is on its way: without them a burst would go to
    whichever replica had least before it.

    Args:
        clock: In seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._replica_of: dict[str, str] = {}
        self._chosen: dict[str, float] = {}
        self._counts: Counter[str] = Counter()

    def choose(self, replica: str, request_id: str) -> None:
        """Note that a request is to go to a replica; the latest choice holds."""
        self.begin(replica, request_id)
        self._chosen[request_id] = self._clock() + CHOSEN_S

    def begin(self, replica: str, request_id: str) -> None:
        """Note that a replica took a request."""
        self.end(request_id)
        self._replica_of[request_id] = replica
        self._counts[replica] += 1

    def end(self, request_id: str) -> None:
        """Note that a request has ended, wherever it was."""
        self._chosen.pop(request_id, None)
        replica = self._replica_of.pop(request_id, None)
        if replica is None:
            return
        self._counts[replica] -= 1
        if not self._counts[replica]:
            del self._counts[replica]

    def count(self, replica: str) -> int:
        """Requests that a replica has, or is to have."""
        now = self._clock()
        while self._chosen:
            request_id, until = next(iter(self._chosen.items()))
            if until > now:
                break
            self.end(request_id)
        return self._counts[replica]
