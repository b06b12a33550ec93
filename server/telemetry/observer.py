"""What the engine's streams tell of themselves while they run, for metrics.

All times are seconds, measured in the HTTP process when the engine's report arrives there: a client
that reads slowly does not make the engine look slow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from headlong.server.engine.outputs import PrefillChunk
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.status import EngineStats

FinishedAs = Literal[
    "stop", "length", "abort", "deadline_exceeded", "cancelled", "draining", "engine_dead"
]
"""How a completion ended: by itself, given up by the engine, left by its client, cut by the
server's shutdown, or died with the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedCompletion:
    """What became of one completion; times are of `time.monotonic`.

    Attributes:
        reason: How it ended.
        num_tokens: Tokens generated.
        first_token: When its first token came, if one did.
        last_token: When its last one came.
        ended: When it ended.
    """

    reason: FinishedAs
    num_tokens: int
    first_token: float | None
    last_token: float | None
    ended: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRequest:
    """What became of one of the engine's requests; times are of `time.monotonic`.

    Attributes:
        request: What was asked.
        started: When it left the queue; None if it never did.
        prefill_chunks: Pieces of the prompt, as far as the engine told of them: that of a request
            whose client left in the midst of it is not known.
        num_cached_tokens: Prompt tokens that the prefix cache had.
        cache_misses: Those that it did not have, by reason; known of completed requests alone.
        completions: Each of its completions.
    """

    request: EngineRequest
    started: float | None
    prefill_chunks: tuple[PrefillChunk, ...]
    num_cached_tokens: int
    cache_misses: Mapping[str, int]
    completions: tuple[EndedCompletion, ...]

    @property
    def first_token(self) -> float | None:
        """When its first token came, if one did."""
        times = [each.first_token for each in self.completions if each.first_token is not None]
        return min(times, default=None)

    @property
    def last_token(self) -> float | None:
        """When its last token came, if one did."""
        times = [each.last_token for each in self.completions if each.last_token is not None]
        return max(times, default=None)

    @property
    def ended(self) -> float:
        """When its last completion ended."""
        return max(each.ended for each in self.completions)


class Observer(Protocol):
    """Told of every report of the engine and of every stage of every request, on the event loop.

    A method must be quick and must not raise.
    """

    def on_step(self, stats: EngineStats) -> None:
        """The engine reported: after a step, or at rest, and then `steps_total` is as before."""

    def on_started(self, queued_s: float) -> None:
        """A request left the queue, `queued_s` after it arrived."""

    def on_first_token(self, ttft_s: float, prefill_s: float) -> None:
        """A completion has its first token.

        Args:
            ttft_s: Since the request arrived.
            prefill_s: Since the request left the queue.
        """

    def on_token(self, itl_s: float) -> None:
        """A completion has a further token, `itl_s` after the one before."""

    def on_finished(
        self,
        reason: FinishedAs,
        num_prompt_tokens: int,
        num_completion_tokens: int,
        e2e_s: float,
        tpot_s: float | None,
    ) -> None:
        """A completion ended.

        Args:
            reason: How.
            num_prompt_tokens: Tokens of its prompt.
            num_completion_tokens: Tokens generated.
            e2e_s: Since the request arrived.
            tpot_s: Mean time between its tokens; None with fewer than two.
        """

    def on_ended(self, record: EndedRequest) -> None:
        """All completions of a request have ended.

        Called where the request is served, so that its context variables hold, and when its reader
        has everything: later than the times in the record. One that the engine refused is not told.
        """


class NoObserver:
    """Does nothing."""

    def on_step(self, stats: EngineStats) -> None:
        """Does nothing."""

    def on_started(self, queued_s: float) -> None:
        """Does nothing."""

    def on_first_token(self, ttft_s: float, prefill_s: float) -> None:
        """Does nothing."""

    def on_token(self, itl_s: float) -> None:
        """Does nothing."""

    def on_finished(
        self,
        reason: FinishedAs,
        num_prompt_tokens: int,
        num_completion_tokens: int,
        e2e_s: float,
        tpot_s: float | None,
    ) -> None:
        """Does nothing."""

    def on_ended(self, record: EndedRequest) -> None:
        """Does nothing."""
