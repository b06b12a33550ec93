"""What the engine's streams tell of themselves while they run, for metrics.

All times are seconds, measured in the HTTP process when the engine's report arrives there: a client
that reads slowly does not make the engine look slow.
"""

from typing import Literal, Protocol

from headlong.server.engine.status import EngineStats

FinishedAs = Literal["stop", "length", "abort", "deadline_exceeded", "cancelled", "engine_dead"]
"""How a completion ended: by itself, given up by the engine, left by its client, or died with the
engine."""


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
