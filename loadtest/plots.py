"""Load tests as pictures: latency over time, and latency against throughput."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from headlong.loadtest.figures import Spread, Summary, concurrency
from headlong.loadtest.records import RequestRecord
from headlong.loadtest.report import Report
from headlong.profiling.files import write_bytes

BLUE = "#1f6feb"
ORANGE = "#d9480f"
RED = "#c92a2a"
GREY = "#868e96"
DARK = "#212529"
LIGHT = "#dee2e6"
LOG_FROM = 12.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""


def plot_report(report: Report, path: Path) -> list[Path]:
    """Draws a report: latencies over time, or of a sweep one picture of all and one of each rate.

    Args:
        report: With its requests.
        path: The file; of a sweep the names of the others have the rate added.

    Returns:
        The files.

    Raises:
        ProfileFileError: If a file cannot be written.
    """
    title = f"{report.config.get('model')} under {report.config.get('workload')} load"
    if len(report.runs) == 1:
        (run,) = report.runs
        plot_latencies(run.requests or (), run.summary, title, path)
        return [path]
    plot_sweep([run.summary for run in report.runs], title, path)
    written = [path]
    for run in report.runs:
        rate = f"{run.summary.asked_rate:g}"
        beside = path.with_name(f"{path.stem}-{rate}{path.suffix}")
        plot_latencies(run.requests or (), run.summary, f"{title}, {rate} requests/s", beside)
        written.append(beside)
    return written


def plot_latencies(
    records: Sequence[RequestRecord], summary: Summary, title: str, path: Path
) -> None:
    """Draws a PNG: TTFT and E2E of each request over the time at which it was sent.

    Below them how many requests were in flight; failed requests are crosses on the time axis.

    Args:
        records: Of one test.
        summary: Its figures.
        title: What was tested.
        path: The file to write, whole or not at all.

    Raises:
        ProfileFileError: If the file cannot be written.
    """
    shown = [record for record in records if not record.warm_up]
    good = [record for record in shown if record.error is None]
    failed = [record for record in shown if record.error is not None]
    figure = Figure(figsize=(8.6, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1.0))
    size = 26 if len(good) <= 300 else 10
    opaque = 0.75 if len(good) <= 300 else 0.45
    series = (
        ("E2E", ORANGE, [(each.sent_s, 1e3 * each.e2e_s) for each in good], summary.e2e_ms),
        (
            "TTFT",
            BLUE,
            [(each.sent_s, 1e3 * each.ttft_s) for each in good if each.ttft_s is not None],
            summary.ttft_ms,
        ),
    )
    labels: list[tuple[float, str, str]] = []
    for name, colour, points, spread in series:
        if spread is None:
            continue
        above.scatter(*zip(*points, strict=True), s=size, color=colour, alpha=opaque,
                      edgecolors="white", linewidths=0.4, zorder=3, clip_on=False)  # fmt: skip
        above.axhline(spread.p50, color=colour, linewidth=1.1, alpha=0.65, zorder=2)
        labels.append(
            (spread.p50, colour, f"{name}\np50 {_time(spread.p50)}\np99 {_time(spread.p99)}")
        )
    _latency_axis(above, [value for _, _, points, _ in series for _, value in points])
    _label_right(above, labels)
    if failed:
        above.plot([each.sent_s for each in failed], [0.015] * len(failed), marker="x",
                   markersize=6, markeredgewidth=1.6, color=RED, linestyle="none", clip_on=False,
                   transform=above.get_xaxis_transform(), zorder=5)  # fmt: skip
    steps = [(0.0, 0), *concurrency(shown)]
    times, counts = [time for time, _ in steps], [count for _, count in steps]
    below.fill_between(times, counts, step="post", color=GREY, alpha=0.25, linewidth=0)
    below.step(times, counts, where="post", color=GREY, linewidth=1.1)
    below.set_ylim(0, max(summary.max_concurrency, 1) * 1.12)
    below.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    _label_right(
        below,
        [(max(counts) / 2, GREY, f"in flight\nmean {summary.mean_concurrency:.1f}\n"
                                 f"max {summary.max_concurrency}")],
    )  # fmt: skip
    below.set_xlim(min(0.0, *times), max(*times, 1e-3))
    below.set_xlabel("seconds after the start, at which the request was sent", fontsize=9)
    for axes in (above, below):
        _plain(axes)
    crosses = f", {len(failed)} failed (crosses)" if failed else ""
    subtitle = (
        f"{len(good)} requests completed{crosses}: {summary.request_throughput:.3g} requests/s, "
        f"{summary.output_throughput:.0f} output tokens/s"
    )
    _head(above, title, subtitle)
    _write(figure, path)


def plot_sweep(summaries: Sequence[Summary], title: str, path: Path) -> None:
    """Draws a PNG: TTFT and TPOT over the throughput that was reached at each asked rate.

    Args:
        summaries: Of one test for each rate.
        title: What was tested.
        path: The file to write, whole or not at all.

    Raises:
        ProfileFileError: If the file cannot be written.
    """
    figure = Figure(figsize=(10.0, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    ordered = sorted(summaries, key=lambda each: each.asked_rate or 0.0)
    _draw_sweep(left, [(each, each.ttft_ms) for each in ordered])
    _draw_sweep(right, [(each, each.tpot_ms) for each in ordered])
    _head(left, title, "time to first token; numbers: requests a second asked for")
    _head(right, "", "time per output token")
    for axes in (left, right):
        axes.set_xlabel("output tokens a second, reached", fontsize=9)
        _plain(axes)
    _write(figure, path)


def _draw_sweep(axes: Axes, points: Sequence[tuple[Summary, Spread | None]]) -> None:
    found = [(summary, spread) for summary, spread in points if spread is not None]
    if not found:
        return
    x = [summary.output_throughput for summary, _ in found]
    labels: list[tuple[float, str, str]] = []
    for name, colour in (("p50", BLUE), ("p99", ORANGE)):
        y = [getattr(spread, name) for _, spread in found]
        axes.plot(x, y, marker="o", markersize=6.5, markeredgecolor="white", color=colour,
                  linewidth=1.8, zorder=3, clip_on=False)  # fmt: skip
        labels.append((y[-1], colour, name))
    for at, (summary, spread) in zip(x, found, strict=True):
        if summary.asked_rate is not None:
            axes.annotate(f"{summary.asked_rate:g}", (at, spread.p50), (5, -12),
                          textcoords="offset points", fontsize=8, color=GREY,
                          annotation_clip=False)  # fmt: skip
    _latency_axis(axes, [value for _, spread in found for value in (spread.p50, spread.p99)])
    axes.set_xlim(0.0, max(x) * 1.05 or 1.0)
    heights = _apart([_height(axes, value) for value, _, _ in labels], 0.055)
    for (_, colour, name), height in zip(labels, heights, strict=True):
        axes.annotate(name, (x[-1], height), (9, 0), xycoords=axes.get_xaxis_transform(),
                      textcoords="offset points", va="center", fontsize=9.5, fontweight="bold",
                      color=colour, annotation_clip=False)  # fmt: skip


def _latency_axis(axes: Axes, values: Sequence[float]) -> None:
    positive = [value for value in values if value > 0.0]
    if positive and max(positive) / min(positive) >= LOG_FROM:
        axes.set_yscale("log")
        axes.set_ylim(min(positive) / 1.6, max(positive) * 1.4)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0.0, max(positive, default=1.0) * 1.12)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _time(value)))


def _label_right(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Writes beside the axes, at heights in data from the lowest on."""
    ordered = sorted(labels)
    inside = [min(max(_height(axes, value), 0.08), 0.92) for value, _, _ in ordered]
    for height, (_, colour, text) in zip(_apart(inside, 0.24), ordered, strict=True):
        axes.annotate(text, (1.0, height), (8, 0), xycoords="axes fraction",
                      textcoords="offset points", va="center", fontsize=8.5, color=colour,
                      linespacing=1.3)  # fmt: skip


def _height(axes: Axes, value: float) -> float:
    """Where a value is on the axes, from 0 to 1."""
    place = axes.transAxes.inverted().transform(axes.transData.transform((0.0, value)))
    return float(place[1])


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Moves ascending heights so far apart that texts there do not overlap."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + least) if placed else height)
    # As far down as up.
    shift = (sum(placed) - sum(heights)) / max(len(placed), 1)
    return [height - shift for height in placed]


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color=LIGHT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(which="both", length=0, labelsize=8.5, labelcolor=DARK)


def _head(axes: Axes, title: str, subtitle: str) -> None:
    # A model's name may hold dollar signs.
    axes.set_title(title, fontsize=12, fontweight="bold", loc="left", pad=24, color=DARK,
                   parse_math=False)  # fmt: skip
    axes.text(0.0, 1.03, subtitle, fontsize=8.5, color=GREY, transform=axes.transAxes)


def _time(milliseconds: float) -> str:
    if milliseconds >= 1000.0:
        return f"{milliseconds / 1000.0:.3g} s"
    return f"{milliseconds:.3g} ms"


def _write(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    write_bytes(path, buffer.getvalue())
