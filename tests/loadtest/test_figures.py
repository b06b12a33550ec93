from typing import Any

import pytest

from headlong.loadtest.figures import Spread, Summary, concurrency, summarize
from headlong.loadtest.goodput import Goodput
from headlong.loadtest.records import RequestRecord
from headlong.loadtest.runner import LoadResult


def record(sent_s: float = 0.0, *gaps_s: float, **fields: Any) -> RequestRecord:
    """A request whose pieces came after these gaps, and whose end was with the last one."""
    times: list[float] = []
    for gap_s in gaps_s:
        times.append((times[-1] if times else sent_s) + gap_s)
    values: dict[str, Any] = {
        "session": 0,
        "turn": 0,
        "scheduled_s": sent_s,
        "sent_s": sent_s,
        "token_times_s": tuple(times),
        "finished_s": times[-1] if times else sent_s,
        "num_prompt_tokens": 10,
        "num_completion_tokens": len(times),
        "num_cached_tokens": None,
        "text": "",
    }
    return RequestRecord(**(values | fields))


def summary(*records: RequestRecord, duration_s: float = 10.0, **options: Any) -> Summary:
    return summarize(LoadResult(records, duration_s), **options)


def test_a_spread() -> None:
    values = [float(value) for value in range(101)]
    assert Spread.of(values) == Spread(50.0, 50.0, 90.0, 99.0, 100.0)
    # 10 values: p90 lies a tenth of the way from the ninth to the tenth.
    ten = Spread.of([float(value) for value in range(10, 0, -1)])
    assert ten is not None
    assert (ten.p50, ten.p90, ten.p99) == pytest.approx((5.5, 9.1, 9.91))
    two = Spread.of([1.0, 2.0])
    assert two is not None
    assert (two.mean, two.p50, two.max) == (1.5, 1.5, 2.0)
    assert (two.p90, two.p99) == pytest.approx((1.9, 1.99))
    assert Spread.of([]) is None


def test_latencies_as_they_are_defined() -> None:
    found = summary(record(1.0, 0.5, 0.1, 0.3), record(2.0, 0.25, 0.05), record(3.0, 0.75))
    assert found.ttft_ms is not None and found.tpot_ms is not None
    assert found.itl_ms is not None and found.e2e_ms is not None
    assert found.ttft_ms.mean == pytest.approx(500.0)
    # (900 - 500) / 2 and (300 - 250) / 1; an answer of one token has none.
    assert found.tpot_ms.mean == pytest.approx((200.0 + 50.0) / 2)
    # All gaps pooled.
    assert found.itl_ms.mean == pytest.approx((100.0 + 300.0 + 50.0) / 3)
    assert found.e2e_ms.mean == pytest.approx((900.0 + 300.0 + 750.0) / 3)
    assert found.e2e_ms.max == pytest.approx(900.0)


def test_several_tokens_in_a_piece_count_in_tpot_and_not_in_itl() -> None:
    found = summary(record(0.0, 0.5, 0.4, num_completion_tokens=5))
    assert found.tpot_ms is not None and found.itl_ms is not None
    assert found.tpot_ms.mean == pytest.approx(100.0)
    assert found.itl_ms.mean == pytest.approx(400.0)


def test_throughput_is_of_the_completed_over_the_whole_duration() -> None:
    failed = record(0.0, 0.1, 0.1, error="stream")
    found = summary(record(0.0, 0.1, 0.1, 0.1), record(0.0, 0.1), failed, duration_s=2.0)
    assert (found.num_requests, found.num_completed) == (3, 2)
    assert (found.num_input_tokens, found.num_output_tokens) == (20, 4)
    assert found.request_throughput == 1.0
    assert found.input_throughput == 10.0
    assert found.output_throughput == 2.0
    assert found.total_throughput == 12.0


def test_errors_by_kind_the_most_frequent_first() -> None:
    kinds = ["http", "timeout", "timeout"]
    found = summary(*(record(error=kind) for kind in kinds))
    assert found.errors == {"timeout": 2, "http": 1}
    assert list(found.errors) == ["timeout", "http"]
    assert found.num_completed == 0
    assert found.ttft_ms is None


def test_the_warm_up_is_in_no_figure() -> None:
    warm = record(-5.0, 4.0, warm_up=True, correct=False, num_cached_tokens=10)
    failed = record(-6.0, warm_up=True, error="http")
    one = record(0.0, 0.5, correct=True, num_cached_tokens=0)
    assert summary(warm, failed, one) == summary(one)


def test_accuracy_is_of_what_was_judged() -> None:
    found = summary(*(record(0.0, 0.1, correct=each) for each in (True, True, False, None)))
    assert (found.accuracy, found.num_judged) == (pytest.approx(2 / 3), 3)
    assert summary(record(0.0, 0.1)).accuracy is None


def test_the_cached_share_is_of_the_requests_that_say() -> None:
    told = record(0.0, 0.1, num_prompt_tokens=30, num_cached_tokens=24)
    other = record(0.0, 0.1, num_prompt_tokens=10, num_cached_tokens=0)
    assert summary(told, other, record(0.0, 0.1)).cached_share == pytest.approx(0.6)
    assert summary(record(0.0, 0.1)).cached_share is None


def test_goodput_is_of_all_requests_failed_ones_too() -> None:
    records = record(0.0, 0.1), record(0.0, 0.9), record(0.0, 0.1, error="timeout")
    found = summary(*records, duration_s=2.0, met=Goodput(ttft=500).met)
    assert found.goodput_share == pytest.approx(1 / 3)
    assert found.goodput == pytest.approx(0.5)
    without = summary(*records)
    assert (without.goodput_share, without.goodput) == (None, None)


def test_rates_are_of_sessions() -> None:
    starts = [0.0, 1.0, 2.0, 3.0]
    records = [
        record(start * 2, 0.1, session=at, scheduled_s=start) for at, start in enumerate(starts)
    ]
    later_turn = record(9.0, 0.1, turn=1)
    found = summary(*records, later_turn, asked_rate=1.1, starts_s=starts)
    assert found.asked_rate == 1.1
    assert found.planned_rate == pytest.approx(1.0)
    assert found.achieved_rate == pytest.approx(0.5)
    assert "requests began at 0.5 a second where 1 were planned" in found.warnings()


@pytest.mark.parametrize("starts", [[], [1.0], [2.0, 2.0]])
def test_no_rate_without_a_span(starts: list[float]) -> None:
    found = summary(*(record(start, 0.1) for start in starts), starts_s=starts)
    assert found.planned_rate is None
    assert found.achieved_rate is None


def test_where_the_server_does_not_count_pieces_are() -> None:
    found = summary(record(0.0, 0.1, 0.1, num_completion_tokens=None, num_prompt_tokens=None))
    assert (found.num_output_tokens, found.num_uncounted) == (2, 1)
    assert found.num_input_tokens == 0
    assert found.tpot_ms is None
    assert any("did not count the tokens of 1 answers" in each for each in found.warnings())


def test_answers_that_say_little_are_told() -> None:
    streamed = record(0.0, 0.1, 0.1)
    at_once = record(0.0, 0.1, 0.0, num_completion_tokens=5)
    found = summary(streamed, at_once, record(0.0), record(0.0, 0.1))
    assert (found.num_empty, found.num_in_one_piece) == (1, 1)
    assert "1 answers have no text: TTFT leaves them out" in found.warnings()
    assert any("1 answers of several tokens came in one piece" in each for each in found.warnings())
    few = summary(*[streamed] * 10, at_once)
    assert few.num_in_one_piece == 1
    assert few.warnings() == []


def test_turns_after_a_failed_one_are_told() -> None:
    found = summarize(LoadResult((record(error="http"),), 1.0, num_not_sent=3))
    assert found.warnings() == ["3 turns were not sent, since one before them failed"]


@pytest.mark.parametrize(("delay_s", "warned"), [(0.02, False), (0.2, True)])
def test_the_generators_own_delay(delay_s: float, warned: bool) -> None:
    late = record(5.0, 0.5, scheduled_s=5.0 - delay_s)
    found = summary(late)
    assert found.generator_delay_ms is not None and found.ttft_ms is not None
    assert found.generator_delay_ms.p99 == pytest.approx(delay_s * 1e3)
    # It is never the server's.
    assert found.ttft_ms.mean == pytest.approx(500.0)
    assert found.e2e_ms is not None and found.e2e_ms.mean == pytest.approx(500.0)
    assert any("generator itself" in each for each in found.warnings()) == warned


def test_concurrency() -> None:
    records = [record(0.0, 2.0), record(1.0, 1.0), record(2.0, 3.0)]
    assert concurrency(records) == [(0.0, 1), (1.0, 2), (2.0, 1), (2.0, 0), (2.0, 1), (5.0, 0)]
    found = summary(*records, duration_s=5.0)
    assert found.max_concurrency == 2
    assert found.mean_concurrency == pytest.approx(6.0 / 5.0)


def test_nothing_at_all() -> None:
    found = summarize(LoadResult((), 0.0, num_not_sent=3, interrupted=True))
    assert found.num_requests == found.num_completed == 0
    assert found.request_throughput == 0.0
    assert found.warnings() == ["interrupted: 0 requests in flight were given up, 3 were not sent"]
