"""An observer that remembers."""

from headlong.server.engine.status import EngineStats
from headlong.server.telemetry.observer import EndedRequest, FinishedAs


class Recorder:
    """Notes what it is told.

    Attributes:
        names: Of the requests' stages, in order.
        steps: Of each report, `steps_total`.
        started: Queue times.
        finished: Reason, prompt tokens and completion tokens of each completion.
        records: Of each request that ended.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.steps: list[int] = []
        self.started: list[float] = []
        self.finished: list[tuple[FinishedAs, int, int]] = []
        self.records: list[EndedRequest] = []

    def on_step(self, stats: EngineStats) -> None:
        self.steps.append(stats.steps_total)

    def on_started(self, queued_s: float) -> None:
        self.names.append("started")
        self.started.append(queued_s)

    def on_first_token(self, ttft_s: float, prefill_s: float) -> None:
        assert ttft_s >= prefill_s >= 0
        self.names.append("first_token")

    def on_token(self, itl_s: float) -> None:
        assert itl_s >= 0
        self.names.append("token")

    def on_finished(
        self,
        reason: FinishedAs,
        num_prompt_tokens: int,
        num_completion_tokens: int,
        e2e_s: float,
        tpot_s: float | None,
    ) -> None:
        assert e2e_s >= 0
        assert (tpot_s is None) == (num_completion_tokens < 2)
        self.names.append("finished")
        self.finished.append((reason, num_prompt_tokens, num_completion_tokens))

    def on_ended(self, record: EndedRequest) -> None:
        assert record.ended >= record.request.arrived
        self.records.append(record)
