"""Several observers as one."""

from collections.abc import Sequence

from headlong.server.engine.status import EngineStats
from headlong.server.telemetry.observer import EndedRequest, FinishedAs, Observer


class JoinedObserver:
    """Passes everything on to each of several observers.

    Args:
        observers: Told in this order.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def on_step(self, stats: EngineStats) -> None:
        """Passes it on."""
        for each in self._observers:
            each.on_step(stats)

    def on_started(self, queued_s: float) -> None:
        """Passes it on."""
        for each in self._observers:
            each.on_started(queued_s)

    def on_first_token(self, ttft_s: float, prefill_s: float) -> None:
        """Passes it on."""
        for each in self._observers:
            each.on_first_token(ttft_s, prefill_s)

    def on_token(self, itl_s: float) -> None:
        """Passes it on."""
        for each in self._observers:
            each.on_token(itl_s)

    def on_finished(
        self,
        reason: FinishedAs,
        num_prompt_tokens: int,
        num_completion_tokens: int,
        e2e_s: float,
        tpot_s: float | None,
    ) -> None:
        """Passes it on."""
        for each in self._observers:
            each.on_finished(reason, num_prompt_tokens, num_completion_tokens, e2e_s, tpot_s)

    def on_ended(self, record: EndedRequest) -> None:
        """Passes it on."""
        for each in self._observers:
            each.on_ended(record)
