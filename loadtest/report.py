"""A load test's report: one JSON file, and tables for people."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue, TypeAdapter, ValidationError
from rich.table import Table

from headlong.loadtest.figures import Spread, Summary
from headlong.loadtest.records import RequestRecord
from headlong.profiling.files import read_json_object, write_bytes

LATENCIES = {"TTFT": "ttft_ms", "TPOT": "tpot_ms", "ITL": "itl_ms", "E2E": "e2e_ms"}
"""Names of the latencies, and where a summary has them."""
COLUMNS = ("mean", "p50", "p90", "p99", "max")

Config = dict[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Run:
    """One test of a report.

    Attributes:
        summary: Its figures.
        requests: Its records, where they were asked for.
    """

    summary: Summary
    requests: tuple[RequestRecord, ...] | None = None

    def failures(self) -> list[str]:
        """Says of each kind of error what most of the requests that had it were told."""
        told: dict[str, Counter[str]] = {}
        for record in self.requests or ():
            if record.error is not None:
                told.setdefault(record.error, Counter())[_failure(record)] += 1
        return [f"{kind}: {each.most_common(1)[0][0]}" for kind, each in told.items()]


@dataclass(frozen=True, slots=True)
class Report:
    """What was asked of a server, and what came of it.

    Attributes:
        config: The command's settings; no key among them.
        started_at: When, in UTC, as ISO 8601 has it.
        runs: One, or one for each rate of a sweep.
    """

    config: Config
    started_at: str
    runs: tuple[Run, ...]

    def without_requests(self) -> "Report":
        """Returns it with figures only."""
        return replace(self, runs=tuple(replace(run, requests=None) for run in self.runs))

    def save(self, path: Path) -> None:
        """Writes it as JSON, whole or not at all.

        Raises:
            ProfileFileError: The file cannot be written.
        """
        write_bytes(path, _REPORT.dump_json(self, indent=1) + b"\n")

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Reads one.

        Raises:
            ProfileFileError: The file cannot be read, or is not JSON.
            ValueError: It holds something else.
        """
        values = read_json_object(path)
        try:
            return _REPORT.validate_python(values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(each) for each in first["loc"])
            raise ValueError(
                f"{path}: is no report of headlong bench: {where}: {first['msg']}"
            ) from error


_REPORT = TypeAdapter(Report)


def _failure(record: RequestRecord) -> str:
    status = "" if record.status in (None, 200) else f" (status {record.status})"
    return f"{record.detail}{status}{' (in the warm-up)' if record.warm_up else ''}"


def latency_table(summary: Summary) -> Table:
    """Draws a line for each latency, in milliseconds."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ms")
    for column in COLUMNS:
        table.add_column(column, justify="right", min_width=8)
    for name, field in LATENCIES.items():
        spread: Spread | None = getattr(summary, field)
        values = ["" if spread is None else _ms(getattr(spread, each)) for each in COLUMNS]
        table.add_row(name, *values)
    return table


def sweep_table(runs: Sequence[Run]) -> Table:
    """Draws a line for each rate of a sweep."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    with_goodput = any(run.summary.goodput_share is not None for run in runs)
    with_accuracy = any(run.summary.accuracy is not None for run in runs)
    columns = ["asked/s", "began/s", "done/s", "tok/s out", "TTFT p50", "p99", "TPOT p50", "p99"]
    columns += ["E2E p50", "p99"] + ["goodput"] * with_goodput + ["right"] * with_accuracy
    for column in (*columns, "failed"):
        table.add_column(column, justify="right")
    for run in runs:
        summary = run.summary
        row = [
            "all at once" if summary.asked_rate is None else f"{summary.asked_rate:g}",
            "" if summary.achieved_rate is None else f"{summary.achieved_rate:.3g}",
            f"{summary.request_throughput:.3g}",
            f"{summary.output_throughput:.1f}",
        ]
        for spread in (summary.ttft_ms, summary.tpot_ms, summary.e2e_ms):
            row += ["", ""] if spread is None else [_ms(spread.p50), _ms(spread.p99)]
        if with_goodput:
            row.append(_share(summary.goodput_share))
        if with_accuracy:
            row.append(_share(summary.accuracy))
        table.add_row(*row, str(summary.num_requests - summary.num_completed))
    return table


def summary_lines(summary: Summary) -> list[str]:
    """Says in text what is no latency."""
    failed = summary.num_requests - summary.num_completed
    kinds = ", ".join(f"{count} {kind}" for kind, count in summary.errors.items())
    lines = [
        f"requests     {summary.num_completed} completed"
        + (f", {failed} failed ({kinds})" if failed else "")
        + f" in {summary.duration_s:.2f} s",
        f"throughput   {summary.request_throughput:.3g} requests/s, "
        f"{summary.output_throughput:.1f} output tok/s, "
        f"{summary.input_throughput:.1f} input tok/s, {summary.total_throughput:.1f} tok/s in all",
        f"tokens       {summary.num_input_tokens} in, {summary.num_output_tokens} out"
        + (
            ""
            if summary.cached_share is None
            else f"; {summary.cached_share:.1%} of the prompts from the prefix cache"
        ),
        f"in flight    {summary.mean_concurrency:.1f} on average, "
        f"{summary.max_concurrency} at most",
    ]
    rates = {
        "asked": summary.asked_rate,
        "planned": summary.planned_rate,
        "achieved": summary.achieved_rate,
    }
    if any(rates[name] is not None for name in ("asked", "planned")):
        said = [f"{rate:.3g}/s {name}" for name, rate in rates.items() if rate is not None]
        lines.append(f"rate         {', '.join(said)}")
    if summary.goodput_share is not None and summary.goodput is not None:
        lines.append(
            f"goodput      {summary.goodput:.3g} requests/s, "
            f"{summary.goodput_share:.1%} of the requests"
        )
    if summary.accuracy is not None:
        lines.append(
            f"accuracy     {summary.accuracy:.1%} of {summary.num_judged} judged answers are right"
        )
    if (delay := summary.generator_delay_ms) is not None:
        lines.append(f"own delay    {delay.p50:.1f} ms p50, {delay.p99:.1f} ms p99")
    return lines


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 1e4 else f"{value:,.0f}".replace(",", " ")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
