"""Two load tests side by side."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from headlong.loadtest.figures import Summary
from headlong.loadtest.report import COLUMNS, LATENCIES, Report

HIGHER_IS_BETTER = {
    "request_throughput": "requests/s",
    "input_throughput": "input tok/s",
    "output_throughput": "output tok/s",
    "goodput": "goodput, requests/s",
    "goodput_share": "goodput, share",
    "accuracy": "accuracy",
    "cached_share": "cached share of prompts",
}
"""Figures, and what they are called; of the latencies and of failures the lower are better."""
SAME_SHARE = 0.02
"""Figures that differ by less than this are not called better: no two runs are alike."""
# What may differ between two tests that ask the same.
_NOT_ASKED = frozenset({"base_url", "model", "output", "plot", "headlong_version", "tokenizer"})


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of both.

    Attributes:
        name: Of the figure, with its unit.
        first: Of the first report.
        second: Of the second.
        lower_is_better: Whether the lower of the two is the better.
    """

    name: str
    first: float
    second: float
    lower_is_better: bool

    @property
    def difference(self) -> float:
        """Second - first."""
        return self.second - self.first

    @property
    def ratio(self) -> float | None:
        """Second / first; None where the first is 0."""
        return self.second / self.first if self.first else None

    @property
    def better(self) -> str:
        """``first``, ``second``, or ``same`` where they differ by less than `SAME_SHARE`."""
        if abs(self.difference) <= SAME_SHARE * max(abs(self.first), abs(self.second)):
            return "same"
        return "second" if (self.difference < 0) == self.lower_is_better else "first"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One test beside another.

    Attributes:
        asked_rate: Of both; None in a closed loop.
        rows: The figures that both have.
    """

    asked_rate: float | None
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class ReportComparison:
    """Two reports side by side.

    Attributes:
        comparisons: Of their tests, rate by rate.
        warnings: What is to be known before they are believed.
    """

    comparisons: tuple[Comparison, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        """Returns it as one JSON object, with what is worked out of each row."""
        comparisons = [
            {
                "asked_rate": each.asked_rate,
                "figures": {
                    row.name: {
                        "first": row.first,
                        "second": row.second,
                        "difference": row.difference,
                        "ratio": row.ratio,
                        "better": row.better,
                    }
                    for row in each.rows
                },
            }
            for each in self.comparisons
        ]
        return json.dumps({"comparisons": comparisons, "warnings": self.warnings})


def compare_reports(first: Report, second: Report) -> ReportComparison:
    """Lays two reports side by side: rate by rate, or one test beside the other.

    Raises:
        ValueError: They have no rate in common.
    """
    warnings = [
        f"{key} differs: {_shown(first.config.get(key))} and {_shown(second.config.get(key))}"
        for key in sorted({*first.config, *second.config} - _NOT_ASKED)
        if first.config.get(key) != second.config.get(key)
    ]
    if len(first.runs) == len(second.runs) == 1:
        pairs = [(first.runs[0].summary, second.runs[0].summary)]
    else:
        others = {run.summary.asked_rate: run.summary for run in second.runs}
        pairs = [
            (run.summary, others[run.summary.asked_rate])
            for run in first.runs
            if run.summary.asked_rate in others
        ]
    if not pairs:
        raise ValueError("the two reports have no request rate in common")
    for name, report in (("first", first), ("second", second)):
        for run in report.runs:
            warnings += [f"{name}: {warning}" for warning in run.summary.warnings()]
    comparisons = (Comparison(one.asked_rate, _rows(one, other)) for one, other in pairs)
    return ReportComparison(tuple(comparisons), tuple(warnings))


def comparison_table(comparison: Comparison, names: Sequence[str]) -> Table:
    """Draws a line for each figure.

    Args:
        comparison: Of two tests.
        names: What the two are called.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    rate = comparison.asked_rate
    table.add_column("figure" if rate is None else f"at {rate:g}/s")
    for column in (*names, "difference", "ratio"):
        table.add_column(column, justify="right")
    table.add_column("better")
    called = {"first": names[0], "second": names[1], "same": ""}
    for row in comparison.rows:
        table.add_row(
            row.name,
            _number(row.first),
            _number(row.second),
            f"{row.difference:+.4g}",
            "" if row.ratio is None else f"{row.ratio:.3f}x",
            called[row.better],
        )
    return table


def _rows(first: Summary, second: Summary) -> tuple[Row, ...]:
    rows: list[Row] = []
    for title, field in LATENCIES.items():
        one, other = getattr(first, field), getattr(second, field)
        if one is not None and other is not None:
            rows += [
                Row(f"{title} {each}, ms", getattr(one, each), getattr(other, each), True)
                for each in COLUMNS
            ]
    for field, title in HIGHER_IS_BETTER.items():
        one, other = getattr(first, field), getattr(second, field)
        if one is not None and other is not None:
            rows.append(Row(title, one, other, False))
    failed = [float(each.num_requests - each.num_completed) for each in (first, second)]
    rows.append(Row("failed requests", failed[0], failed[1], True))
    return tuple(rows)


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _shown(value: object) -> str:
    return "not said" if value is None else str(value)
