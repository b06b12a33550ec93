import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from headlong.loadtest.compare import compare_reports, comparison_table
from headlong.loadtest.figures import Summary, summarize
from headlong.loadtest.plots import plot_report
from headlong.loadtest.records import RequestRecord
from headlong.loadtest.report import Report, Run, latency_table, summary_lines, sweep_table
from headlong.loadtest.runner import LoadResult

PNG = b"\x89PNG\r\n\x1a\n"


def records(pace: float = 1.0) -> tuple[RequestRecord, ...]:
    """Three good requests, one that failed, and one of the warm-up."""
    made: list[RequestRecord] = []
    for index in range(5):
        sent_s = float(index) - 1.0
        times = tuple(sent_s + pace * (0.2 + 0.1 * step) for step in range(4))
        failed = index == 3
        made.append(
            RequestRecord(
                session=index,
                turn=0,
                scheduled_s=sent_s,
                sent_s=sent_s,
                token_times_s=() if failed else times,
                finished_s=times[-1],
                num_prompt_tokens=100,
                num_completion_tokens=4,
                num_cached_tokens=50,
                text="answer",
                correct=index == 1,
                error="timeout" if failed else None,
                detail="no end in 1 s" if failed else "",
                warm_up=index == 0,
            )
        )
    return tuple(made)


def run(pace: float = 1.0, rate: float | None = None) -> Run:
    result = LoadResult(records(pace), 4.0 * pace)
    met = (lambda each: each.error is None) if rate else None
    starts = None if rate is None else [0.0, 1.0, 2.0, 3.0]
    return Run(summarize(result, asked_rate=rate, starts_s=starts, met=met), result.records)


def report(*runs: Run, **config: Any) -> Report:
    made: Any = {"base_url": "http://one", "model": "m $^$", "workload": "random", **config}
    return Report(made, "2030-01-01T00:00:00+00:00", runs or (run(),))


def printed(table: Table) -> list[str]:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = report(run(rate=2.0), run(rate=4.0))
    written.save(tmp_path / "a.json")
    assert Report.load(tmp_path / "a.json") == written


def test_without_requests_it_holds_no_answers(tmp_path: Path) -> None:
    report().without_requests().save(tmp_path / "a.json")
    assert "answer" not in (tmp_path / "a.json").read_text()
    assert Report.load(tmp_path / "a.json").runs[0].summary == run().summary


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ("{}", "is no report of headlong bench: config: "),
        ('{"config": {}, "started_at": "", "runs": [{}]}', r"runs\.0\.summary"),
    ],
)
def test_what_is_no_report(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Report.load(path)
    assert str(path) in str(caught.value)


def test_the_table_of_latencies() -> None:
    lines = printed(latency_table(run().summary))
    assert lines[0].split() == ["ms", "mean", "p50", "p90", "p99", "max"]
    assert lines[1].split() == ["TTFT", "200.0", "200.0", "200.0", "200.0", "200.0"]
    assert lines[4].split() == ["E2E", "500.0", "500.0", "500.0", "500.0", "500.0"]


def test_what_is_said_beside_it() -> None:
    lines = summary_lines(run(rate=2.0).summary)
    assert lines[0] == "requests     3 completed, 1 failed (1 timeout) in 4.00 s"
    assert "300 in, 12 out; 50.0% of the prompts from the prefix cache" in lines[2]
    assert "rate         2/s asked, 1/s planned, 1/s achieved" in lines
    assert "goodput      0.75 requests/s, 75.0% of the requests" in lines
    assert "accuracy     33.3% of 3 judged answers are right" in lines


def test_a_trace_has_rates_that_nobody_asked_for_and_a_closed_loop_none() -> None:
    result = LoadResult(records(), 4.0)
    trace = summary_lines(summarize(result, starts_s=[0.0, 2.0, 4.0, 6.0]))
    assert "rate         0.5/s planned, 1/s achieved" in trace
    assert not any(line.startswith("rate") for line in summary_lines(run().summary))


def test_nothing_completed_can_be_shown(tmp_path: Path) -> None:
    failed = tuple(replace(each, error="connect", token_times_s=()) for each in records())
    empty = Run(summarize(LoadResult(failed, 1.0)), failed)
    assert printed(latency_table(empty.summary))[1] == "TTFT"
    assert summary_lines(empty.summary)[0].startswith("requests     0 completed, 4 failed")
    made = report(empty)
    assert plot_report(made, tmp_path / "a.png") == [tmp_path / "a.png"]
    swept = report(*(replace(empty, summary=replace(empty.summary, asked_rate=rate))
                     for rate in (1.0, 2.0)))  # fmt: skip
    assert len(plot_report(swept, tmp_path / "b.png")) == 3
    assert len(printed(sweep_table(swept.runs))) == 3


def test_the_table_of_a_sweep() -> None:
    lines = printed(sweep_table([run(rate=2.0), run(2.0, rate=4.0)]))
    assert lines[1].split()[:6] == ["2", "1", "0.75", "3.0", "200.0", "200.0"]
    assert lines[2].split()[:6] == ["4", "1", "0.375", "1.5", "400.0", "400.0"]


def test_what_most_failures_of_each_kind_were_is_told() -> None:
    made = run()
    assert made.failures() == ["timeout: no end in 1 s"]
    assert made.requests is not None
    good, _, other, failed, _ = made.requests
    late = replace(failed, detail="late")
    refused = replace(good, error="http", status=500, detail="broken", warm_up=True)
    seen = replace(made, requests=(other, late, failed, failed, refused))
    assert seen.failures() == [
        "timeout: no end in 1 s",
        "http: broken (status 500) (in the warm-up)",
    ]


def test_pictures(tmp_path: Path) -> None:
    assert plot_report(report(), tmp_path / "one.png") == [tmp_path / "one.png"]
    swept = report(run(rate=2.5), run(2.0, rate=5.0))
    written = plot_report(swept, tmp_path / "sweep.png")
    names = [path.name for path in written]
    assert names == ["sweep.png", "sweep-2.5.png", "sweep-5.png"]
    assert all(path.read_bytes().startswith(PNG) for path in [tmp_path / "one.png", *written])


def test_a_comparison() -> None:
    found = compare_reports(report(run(1.0)), report(run(2.0), base_url="http://two"))
    (comparison,) = found.comparisons
    rows = {row.name: row for row in comparison.rows}
    ttft = rows["TTFT p50, ms"]
    assert (ttft.first, ttft.second) == (pytest.approx(200.0), pytest.approx(400.0))
    assert (ttft.difference, ttft.ratio) == (pytest.approx(200.0), pytest.approx(2.0))
    assert ttft.better == "first"
    output = rows["output tok/s"]
    assert (output.ratio, output.better) == (pytest.approx(0.5), "first")
    assert rows["accuracy"].better == "same"
    assert rows["failed requests"].better == "same"
    # Where they ran is what is compared.
    assert found.warnings == ()
    values = json.loads(found.to_json())["comparisons"][0]["figures"]
    assert values["output tok/s"]["better"] == "first"
    lines = printed(comparison_table(comparison, ("a", "b")))
    assert lines[2].split() == ["TTFT", "p50,", "ms", "200", "400", "+200", "2.000x", "a"]


def test_configs_that_differ_are_said() -> None:
    found = compare_reports(report(num_prompts=5), report(num_prompts=7, seed=1))
    assert found.warnings == ("num_prompts differs: 5 and 7", "seed differs: not said and 1")


def test_a_sweep_is_compared_rate_by_rate() -> None:
    found = compare_reports(
        report(run(rate=2.0), run(rate=4.0)), report(run(rate=4.0), run(rate=8.0))
    )
    assert [each.asked_rate for each in found.comparisons] == [4.0]
    with pytest.raises(ValueError, match="no request rate in common"):
        compare_reports(report(run(rate=2.0)), report(run(rate=4.0), run(rate=8.0)))


def test_what_one_of_them_lacks_is_left_out() -> None:
    with_goodput: Summary = run(rate=2.0).summary
    found = compare_reports(report(Run(with_goodput)), report())
    assert not any("goodput" in row.name for row in found.comparisons[0].rows)
