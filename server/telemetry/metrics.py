"""Metrics for Prometheus: histograms of what requests go through, and counts of their ends.

Names are vLLM's, after ``headlong:``, so that dashboards carry over. What the engine counts itself
is read when it is asked for, see `engine_metrics`.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from headlong.server.engine.status import EngineStats
from headlong.server.errors import HeadlongError
from headlong.server.telemetry.engine_metrics import MODEL_LABEL, PREFIX, EngineCollector
from headlong.server.telemetry.observer import EndedRequest, FinishedAs

if TYPE_CHECKING:
    from headlong.server.async_engine import AsyncEngine

_OPEN_METRICS = "application/openmetrics-text"

# Seconds: vLLM's buckets, and finer ones below them for small models and cached prompts.
_FIRST_TOKEN_TIMES = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
_TOKEN_TIMES = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5,
    7.5, 10, 20, 40, 80,
)  # fmt: skip
_REQUEST_TIMES = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50,
    60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_COMPLETIONS = (1, 2, 5, 10, 20, 50, 100)


class Metrics:
    """An observer whose memory Prometheus reads.

    Args:
        engine: Its stats are read at every scrape.
        model_name: The label of all series.
    """

    def __init__(self, engine: "AsyncEngine", model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._steps_total = 0
        self._registry.register(EngineCollector(engine, model_name))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        tokens = _token_buckets(engine.max_model_len)
        self._ttft = self._histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            _FIRST_TOKEN_TIMES,
        )
        self._itl = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a completion.", _TOKEN_TIMES
        )
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time between the tokens of a completion.",
            _TOKEN_TIMES,
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds",
            "From a request's arrival to the end of a completion.",
            _REQUEST_TIMES,
        )
        self._queue = self._histogram(
            "request_queue_time_seconds",
            "From a request's arrival to its first step.",
            _REQUEST_TIMES,
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds",
            "From a request's first step to its first token.",
            _REQUEST_TIMES,
        )
        self._decode = self._histogram(
            "request_decode_time_seconds",
            "From a request's first token to its last.",
            _REQUEST_TIMES,
        )
        self._inference = self._histogram(
            "request_inference_time_seconds",
            "From a request's first step to its last token.",
            _REQUEST_TIMES,
        )
        self._max_tokens = self._histogram(
            "request_params_max_tokens", "Most tokens that a completion may have.", tokens
        )
        self._n = self._histogram(
            "request_params_n", "Completions that a prompt is to get.", _COMPLETIONS
        )
        self._max_generation_tokens = self._histogram(
            "request_max_num_generation_tokens",
            "Tokens of the longest completion of a prompt.",
            tokens,
        )
        self._prompt_tokens = self._histogram(
            "request_prompt_tokens", "Tokens of the prompt, of each completion.", tokens
        )
        self._computed_tokens = self._histogram(
            "request_prefill_kv_computed_tokens",
            "Tokens of a prompt that the prefix cache did not have.",
            tokens,
        )
        self._generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens generated, of each completion.", tokens
        )
        self._step_tokens = self._histogram(
            "iteration_tokens_total", "Prompt tokens and decodes of a step.", tokens
        )
        self._finished = Counter(
            f"{PREFIX}request_success",
            "Completions that ended, by how they did.",
            (MODEL_LABEL, "finished_reason"),
            registry=self._registry,
        )
        for reason in get_args(FinishedAs):
            self._finished.labels(model_name, reason)
        self._rejected = Counter(
            f"{PREFIX}request_rejections",
            "Requests that were turned away, by the code or type of their error.",
            (MODEL_LABEL, "reason"),
            registry=self._registry,
        )
        # Of a series that begins at 1, nobody sees the first one.
        for code in sorted(_rejections(HeadlongError)):
            self._rejected.labels(model_name, code)

    def register(self, collector: Collector) -> None:
        """Adds what another collector has to tell."""
        self._registry.register(collector)

    def expose(self, accept: str) -> tuple[bytes, str]:
        """Writes all metrics.

        Args:
            accept: The Accept header.

        Returns:
            The text, and its content type: OpenMetrics for who asks for it, else Prometheus'.
        """
        kinds = {part.partition(";")[0].strip() for part in accept.split(",")}
        if _OPEN_METRICS in kinds:
            encode: Callable[[CollectorRegistry, str], bytes] = openmetrics.generate_latest
            # With any other escaping the library replaces the colon, which needs none.
            text = encode(self._registry, openmetrics.ALLOWUTF8)
            return text, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def count_rejection(self, reason: str) -> None:
        """Counts a request that was turned away.

        Args:
            reason: Of a closed set: each makes a series for ever.
        """
        self._rejected.labels(self._model_name, reason).inc()

    def on_step(self, stats: EngineStats) -> None:
        """Counts the tokens of a step; a report may also come without a new one."""
        if stats.steps_total == self._steps_total:
            return
        self._steps_total = stats.steps_total
        self._step_tokens.observe(stats.step_prefill_tokens + stats.step_decode_tokens)

    def on_started(self, queued_s: float) -> None:
        """Notes how long a request waited."""
        self._queue.observe(queued_s)

    def on_first_token(self, ttft_s: float, prefill_s: float) -> None:
        """Notes how long a first token took."""
        self._ttft.observe(ttft_s)
        self._prefill.observe(prefill_s)

    def on_token(self, itl_s: float) -> None:
        """Notes how long a further token took."""
        self._itl.observe(itl_s)

    def on_finished(
        self,
        reason: FinishedAs,
        num_prompt_tokens: int,
        num_completion_tokens: int,
        e2e_s: float,
        tpot_s: float | None,
    ) -> None:
        """Counts a completion, and notes its size and times."""
        self._finished.labels(self._model_name, reason).inc()
        self._prompt_tokens.observe(num_prompt_tokens)
        self._generation_tokens.observe(num_completion_tokens)
        self._e2e.observe(e2e_s)
        if tpot_s is not None:
            self._tpot.observe(tpot_s)

    def on_ended(self, record: EndedRequest) -> None:
        """Notes what a request asked for, and how long it ran."""
        self._n.observe(record.request.n)
        self._max_tokens.observe(record.request.params.max_tokens)
        self._max_generation_tokens.observe(max(each.num_tokens for each in record.completions))
        started, first, last = record.started, record.first_token, record.last_token
        if started is not None:
            num_prompt_tokens = len(record.request.prompt_token_ids)
            self._computed_tokens.observe(num_prompt_tokens - record.num_cached_tokens)
        if started is not None and first is not None and last is not None:
            self._decode.observe(last - first)
            self._inference.observe(last - started)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(
            PREFIX + name, text, (MODEL_LABEL,), buckets=buckets, registry=self._registry
        )
        return family.labels(self._model_name)


def _rejections(kind: type[HeadlongError]) -> set[str]:
    """Codes or types of the errors of a class and its children that turn a request away."""
    found = {kind.code or kind.type} if kind.status < 500 or kind.status == 503 else set[str]()
    return found.union(*map(_rejections, kind.__subclasses__()))


def _token_buckets(most: int) -> list[float]:
    """1, 2, 5, 10, 20, 50 and so on, up to and with `most`."""
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    return [*(float(each) for each in steps if each < most), float(most)]
