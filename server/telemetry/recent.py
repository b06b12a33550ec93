"""How fast the server was just now, for people who watch it. Histograms over time are `/metrics`'.

Times are seconds. Memory is bounded, whatever the load.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headlong.server.engine.status import EngineStats
from headlong.server.telemetry.observer import NoObserver

RATE_WINDOW_S = 10.0
LATENCY_WINDOW_S = 60.0
SAMPLE_EVERY_S = 0.25
MAX_TTFTS = 512
MAX_ITLS = 2048


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second over the last `RATE_WINDOW_S`, or since the start if that is less."""

    prompt_tokens: float
    generation_tokens: float


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of the last `LATENCY_WINDOW_S`; of a busy server, only of the latest tokens in it.

    Attributes:
        num_first_tokens: Completions that TTFT is about.
        ttft_p50_s: Median time from a request's arrival to its first token; None without any.
        ttft_p90_s: Nine in ten were at most this.
        itl_p50_s: Median time between two tokens of a completion; None without any.
    """

    num_first_tokens: int
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    itl_p50_s: float | None


@dataclass(frozen=True, slots=True)
class _Totals:
    at: float
    prompt_tokens: int
    generation_tokens: int


class RecentFigures(NoObserver):
    """An observer that remembers the last minute.

    Args:
        clock: In seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._latest = _Totals(clock(), 0, 0)
        # Two samples may lie close together, three may not.
        num_samples = 2 * math.ceil(RATE_WINDOW_S / SAMPLE_EVERY_S) + 1
        self._samples: deque[_Totals] = deque([self._latest], maxlen=num_samples)
        self._ttfts: deque[tuple[float, float]] = deque(maxlen=MAX_TTFTS)
        self._itls: deque[tuple[float, float]] = deque(maxlen=MAX_ITLS)

    def rates(self) -> Rates:
        """Tokens per second."""
        now = self._clock()
        # What was true at the window's start is the last state that was reached before it.
        base = self._samples[0]
        for sample in (*self._samples, self._latest):
            if sample.at > now - RATE_WINDOW_S:
                break
            base = sample
        # At least a second: the first step alone says little about a rate.
        elapsed_s = min(max(now - base.at, 1.0), RATE_WINDOW_S)
        return Rates(
            (self._latest.prompt_tokens - base.prompt_tokens) / elapsed_s,
            (self._latest.generation_tokens - base.generation_tokens) / elapsed_s,
        )

    def latencies(self) -> Latencies:
        """How long requests waited for their tokens."""
        since = self._clock() - LATENCY_WINDOW_S
        ttfts = sorted(seconds for at, seconds in self._ttfts if at >= since)
        itls = sorted(seconds for at, seconds in self._itls if at >= since)
        return Latencies(
            num_first_tokens=len(ttfts),
            ttft_p50_s=percentile(ttfts, 50),
            ttft_p90_s=percentile(ttfts, 90),
            itl_p50_s=percentile(itls, 50),
        )

    def on_step(self, stats: EngineStats) -> None:
        """Notes how many tokens there have been."""
        now = self._clock()
        # What was true until now: after a pause, this step alone must count.
        if now - self._samples[-1].at >= SAMPLE_EVERY_S:
            self._samples.append(self._latest)
        self._latest = _Totals(now, stats.prompt_tokens_total, stats.generation_tokens_total)

    def on_first_token(self, ttft_s: float, prefill_s: float) -> None:
        """Notes a completion's first token."""
        self._ttfts.append((self._clock(), ttft_s))

    def on_token(self, itl_s: float) -> None:
        """Notes a further token."""
        self._itls.append((self._clock(), itl_s))


def percentile(ascending: Sequence[float], percent: int) -> float | None:
    """Returns the smallest value that `percent` of all are not above (nearest rank).

    Args:
        ascending: In order.
        percent: 1 to 100.

    Returns:
        None if there are no values.
    """
    if not ascending:
        return None
    return ascending[math.ceil(len(ascending) * percent / 100) - 1]
