"""What a load test's records amount to.

Definitions are those of ``vllm bench serve``, so that figures can be laid side by side. Latencies
and tokens are those of the requests that did not fail; requests of the warm-up are in no figure.

- TTFT: from a request's being sent to its first piece of text.
- E2E: from its being sent to the last chunk of its answer, which says why it ended.
- TPOT: (E2E - TTFT) / (completion tokens - 1), one value for each request of two tokens or more.
- ITL: time between neighbouring pieces of text, all gaps of all requests pooled. Where a server
  sends several tokens in a piece, ITL is longer than TPOT.
- Percentiles interpolate linearly between ranks.
- Throughput: what was done over the whole duration, from the start of the test to the end of its
  last request.

Two things differ on purpose. A chunk without text is no piece here: vLLM's bench counts the first
chunk of a chat, which only says who speaks, as the first token. An answer without any text is a
success here if the server ended it properly.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from headlong.loadtest.records import RequestRecord
from headlong.loadtest.runner import LoadResult

SLOW_GENERATOR_MS = 50.0
SLOW_GENERATOR_SHARE = 0.1
"""The generator's own delay is too long if its p99 is over the one, and over this share of the
median TTFT."""
BEHIND_SHARE = 0.05
"""Least share by which sessions begin more slowly than planned that is worth saying."""
ONE_PIECE_SHARE = 0.1
"""Least share of answers in one piece that is worth saying: a few are short by chance."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How values are spread."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """Measures values; None if there are none."""
        found = np.fromiter(values, dtype=np.float64)
        if not found.size:
            return None
        p50, p90, p99 = (float(each) for each in np.percentile(found, (50, 90, 99)))
        return cls(float(found.mean()), p50, p90, p99, float(found.max()))


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one test.

    Attributes:
        num_requests: Requests that ended, well or not, without those of the warm-up.
        num_completed: Those that did not fail.
        errors: The others by kind.
        num_cut: Requests in flight when the test was interrupted.
        num_not_sent: Turns that never were sent.
        interrupted: Whether the test was ended before its time.
        duration_s: From the start of the test to the end of its last request.
        ttft_ms: Time to the first piece.
        tpot_ms: Time of each token after the first.
        itl_ms: Time between pieces.
        e2e_ms: Time to the end.
        num_input_tokens: Prompt tokens of the completed requests, as the server counted them.
        num_output_tokens: The same of their answers. Where the server did not count, pieces are.
        num_uncounted: Completed requests whose tokens the server did not count.
        num_empty: Completed requests whose answers have no text.
        num_in_one_piece: Completed requests of several tokens that came all at once, so that their
            TPOT is about 0.
        request_throughput: Completed requests a second.
        input_throughput: Prompt tokens a second.
        output_throughput: Answers' tokens a second.
        total_throughput: Both.
        asked_rate: Sessions a second that were asked for; None in a closed loop.
        planned_rate: Sessions a second of the plan, between its first and its last: random arrivals
            differ from what was asked. None in a closed loop, or with one session.
        achieved_rate: Sessions a second that did begin, between the first and the last.
        goodput_share: Share of the requests, failed ones included, that met every aim; None if
            there are no aims.
        goodput: Such requests a second.
        accuracy: Share of right answers among those judged; None if none was.
        num_judged: Answers that were judged.
        cached_share: Share of the prompt tokens that the server found in its prefix cache, over the
            requests of which it says so; None if there are none.
        generator_delay_ms: The load generator's own delay: from when requests were due to when they
            were sent. Part of no latency.
        mean_concurrency: Requests in flight, averaged over the duration.
        max_concurrency: Most requests in flight.
    """

    num_requests: int
    num_completed: int
    errors: dict[str, int]
    num_cut: int
    num_not_sent: int
    interrupted: bool
    duration_s: float
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None
    num_input_tokens: int
    num_output_tokens: int
    num_uncounted: int
    num_empty: int
    num_in_one_piece: int
    request_throughput: float
    input_throughput: float
    output_throughput: float
    total_throughput: float
    asked_rate: float | None
    planned_rate: float | None
    achieved_rate: float | None
    goodput_share: float | None
    goodput: float | None
    accuracy: float | None
    num_judged: int
    cached_share: float | None
    generator_delay_ms: Spread | None
    mean_concurrency: float
    max_concurrency: int

    def warnings(self) -> list[str]:
        """What is to be known before the figures are believed."""
        found: list[str] = []
        if self.interrupted:
            found.append(
                f"interrupted: {self.num_cut} requests in flight were given up, "
                f"{self.num_not_sent} were not sent"
            )
        elif self.num_not_sent:
            found.append(f"{self.num_not_sent} turns were not sent, since one before them failed")
        delay, ttft = self.generator_delay_ms, self.ttft_ms
        if delay is not None and ttft is not None:
            limit = max(SLOW_GENERATOR_MS, SLOW_GENERATOR_SHARE * ttft.p50)
            if delay.p99 > limit:
                found.append(
                    f"the load generator itself was late by {delay.p99:.0f} ms (p99): "
                    "its machine is too busy for this load"
                )
        planned, achieved = self.planned_rate, self.achieved_rate
        slow = planned and achieved and achieved < planned * (1.0 - BEHIND_SHARE)
        if slow and not self.interrupted:
            found.append(
                f"requests began at {achieved:.3g} a second where {planned:.3g} were planned"
            )
        if self.num_uncounted:
            found.append(
                f"the server did not count the tokens of {self.num_uncounted} answers: "
                "each piece of text counts as one, and TPOT leaves them out"
            )
        if self.num_empty:
            found.append(f"{self.num_empty} answers have no text: TTFT leaves them out")
        if self.num_in_one_piece > ONE_PIECE_SHARE * self.num_completed:
            found.append(
                f"{self.num_in_one_piece} answers of several tokens came in one piece: the server "
                "does not stream them, and TPOT and ITL say little"
            )
        return found


def summarize(
    result: LoadResult,
    *,
    asked_rate: float | None = None,
    starts_s: Sequence[float] | None = None,
    met: Callable[[RequestRecord], bool] | None = None,
) -> Summary:
    """Works out the figures.

    Args:
        result: Of the test.
        asked_rate: Sessions a second that were asked for.
        starts_s: When sessions were planned to begin; None in a closed loop.
        met: Whether a request met every aim; None if there are no aims.
    """
    records = [record for record in result.records if not record.warm_up]
    good = [record for record in records if record.error is None]
    judged = [record for record in good if record.correct is not None]
    num_met = None if met is None else sum(map(met, records))
    num_input = sum(record.num_prompt_tokens or 0 for record in good)
    num_output = sum(map(num_tokens, good))
    began = [record.sent_s for record in records if record.turn == 0]
    busy_s = sum(record.e2e_s for record in records)

    def a_second(count: float) -> float:
        return count / result.duration_s if result.duration_s > 0 else 0.0

    return Summary(
        num_requests=len(records),
        num_completed=len(good),
        errors=dict(Counter(record.error for record in records if record.error).most_common()),
        num_cut=result.num_cut,
        num_not_sent=result.num_not_sent,
        interrupted=result.interrupted,
        duration_s=result.duration_s,
        ttft_ms=Spread.of(1e3 * each for record in good if (each := record.ttft_s) is not None),
        tpot_ms=Spread.of(1e3 * each for record in good if (each := record.tpot_s) is not None),
        itl_ms=Spread.of(1e3 * each for record in good for each in record.itl_s),
        e2e_ms=Spread.of(1e3 * record.e2e_s for record in good),
        num_input_tokens=num_input,
        num_output_tokens=num_output,
        num_uncounted=sum(record.num_completion_tokens is None for record in good),
        num_empty=sum(not record.token_times_s for record in good),
        num_in_one_piece=sum(map(_came_at_once, good)),
        request_throughput=a_second(len(good)),
        input_throughput=a_second(num_input),
        output_throughput=a_second(num_output),
        total_throughput=a_second(num_input + num_output),
        asked_rate=asked_rate,
        planned_rate=None if starts_s is None else _rate(starts_s),
        achieved_rate=_rate(began),
        goodput_share=None if num_met is None or not records else num_met / len(records),
        goodput=None if num_met is None else a_second(num_met),
        accuracy=sum(map(_is_right, judged)) / len(judged) if judged else None,
        num_judged=len(judged),
        cached_share=_cached_share(good),
        generator_delay_ms=Spread.of(1e3 * (each.sent_s - each.scheduled_s) for each in records),
        mean_concurrency=a_second(busy_s),
        max_concurrency=max((count for _, count in concurrency(records)), default=0),
    )


def num_tokens(record: RequestRecord) -> int:
    """An answer's tokens; its pieces where the server did not count."""
    if record.num_completion_tokens is None:
        return len(record.token_times_s)
    return record.num_completion_tokens


def concurrency(records: Iterable[RequestRecord]) -> list[tuple[float, int]]:
    """Returns how many requests were in flight, from each time on at which that changes.

    A request that ends at the time at which another begins makes room for it first.
    """
    changes = [(record.sent_s, 1) for record in records]
    changes += [(record.finished_s, -1) for record in records]
    changes.sort()
    counts = accumulate(change for _, change in changes)
    return [(time_s, count) for (time_s, _), count in zip(changes, counts, strict=True)]


def _came_at_once(record: RequestRecord) -> bool:
    return len(set(record.token_times_s)) == 1 and num_tokens(record) > 1


def _is_right(record: RequestRecord) -> bool:
    return record.correct is True


def _rate(times_s: Sequence[float]) -> float | None:
    if len(times_s) < 2:
        return None
    span_s = max(times_s) - min(times_s)
    return (len(times_s) - 1) / span_s if span_s > 0 else None


def _cached_share(records: Sequence[RequestRecord]) -> float | None:
    told = [record for record in records if record.num_cached_tokens is not None]
    num_prompt = sum(record.num_prompt_tokens or 0 for record in told)
    if not num_prompt:
        return None
    return sum(record.num_cached_tokens or 0 for record in told) / num_prompt
