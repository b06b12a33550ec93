"""What a load test saw of each request."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

ErrorKind = Literal["connect", "timeout", "rejected", "http", "stream", "protocol"]
"""Why a request failed: no connection, or one that ended without an answer; no end in time; a 429
or 503; another status; an error after the stream had begun, or its sudden end; what came is not
what the API says."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, from its planned start to its end. Times in seconds after the test's start.

    Attributes:
        session: Index of its session.
        turn: Index in that session.
        scheduled_s: When it was to be sent. What lies between this and `sent_s` is the load
            generator's own delay, which is reported and never counted as the server's.
        sent_s: When it was sent.
        token_times_s: When each piece of text came; a piece may hold several tokens.
        finished_s: When the answer was whole, or when it failed.
        num_prompt_tokens: As the server counted them; None if it did not say.
        num_completion_tokens: The same of the answer.
        num_cached_tokens: Prompt tokens that the server found in its prefix cache; None if it did
            not say.
        text: The answer, as far as it came.
        correct: Whether it holds what was expected; None if it is not judged.
        error: Why it failed; None if it did not.
        status: Of the response; None if there was none.
        detail: What the error said, shortened.
        warm_up: Whether it is left out of all figures.
    """

    session: int
    turn: int
    scheduled_s: float
    sent_s: float
    token_times_s: tuple[float, ...]
    finished_s: float
    num_prompt_tokens: int | None
    num_completion_tokens: int | None
    num_cached_tokens: int | None
    text: str
    correct: bool | None = None
    error: ErrorKind | None = None
    status: int | None = None
    detail: str = ""
    warm_up: bool = False

    @property
    def ttft_s(self) -> float | None:
        """From being sent to the first piece of text."""
        return self.token_times_s[0] - self.sent_s if self.token_times_s else None

    @property
    def e2e_s(self) -> float:
        """From being sent to the end."""
        return self.finished_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time of each token after the first; None if there is no second one.

        (e2e - ttft) / (num_completion_tokens - 1)
        """
        if self.ttft_s is None or (self.num_completion_tokens or 0) < 2:
            return None
        assert self.num_completion_tokens is not None
        return (self.e2e_s - self.ttft_s) / (self.num_completion_tokens - 1)

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Times between neighbouring pieces of text."""
        return tuple(after - before for before, after in pairwise(self.token_times_s))
