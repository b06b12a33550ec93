"""What following structures may cost the requests that ask for it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from headlong.server.errors import InvalidRequestError

# JSON Schemas take well under a millisecond a token. The states that a structure's first tokens
# find are worked out once, and may take longer.
FOLLOWING_S = 1.0
FOLLOWING_S_PER_TOKEN = 0.005


class FollowingBudget:
    """The processor time that one request's structure may take in the engine's steps.

    All requests wait for a step: a structure that takes long at each token ends its own request.

    Args:
        clock: Seconds that the calling thread has run for, not those that it waited.
    """

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock
        self._spent_s = 0.0
        self._num_tokens = 0

    @contextmanager
    def spend(self) -> Iterator[None]:
        """Count what is done inside."""
        begun = self._clock()
        try:
            yield
        finally:
            self._spent_s += self._clock() - begun

    def add_token(self) -> None:
        """Allow the time of one more token."""
        self._num_tokens += 1

    def check(self) -> None:
        """Raises `InvalidRequestError` if more was spent than is allowed so far."""
        allowed_s = FOLLOWING_S + FOLLOWING_S_PER_TOKEN * self._num_tokens
        if self._spent_s > allowed_s:
            raise InvalidRequestError(
                "the structure takes too long to follow: "
                f"{self._spent_s:.2f} s for {self._num_tokens} tokens"
            )
