"""A memory plan as a picture: where the memory goes, and how many sequences fit it."""

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from headlong.server.commands.plan_report import grouped, memory_parts, own_name, title, tokens_name
from headlong.server.engine.describe import format_bytes
from headlong.server.engine.sizing import CacheSizing, Sizing

BLUE = "#1f6feb"
ORANGE = "#d9480f"
GREY = "#868e96"
DARK = "#212529"
PART_COLOURS = ("#5c4a37", "#e0a100", "#0c8599", "#9c36b5", BLUE, "#e9ecef")
LEAST_LABELLED = 0.06
"""Parts of the bar that are smaller than this are labelled below it only."""


def plan_png(sizing: Sizing) -> bytes:
    """Draws a plan as PNG: a bar of the memory, and sequences over their length."""
    figure = Figure(figsize=(8.4, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, height_ratios=(1.0, 4.2))
    _draw_memory(top, sizing)
    _draw_sequences(bottom, sizing)
    figure.suptitle(title(sizing), fontsize=11, fontweight="bold", x=0.012, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def _draw_memory(axes: Axes, sizing: Sizing) -> None:
    parts = memory_parts(sizing)
    total = sum(size for _, size in parts)
    left = 0
    for (name, size), colour in zip(parts, _part_colours(len(parts)), strict=True):
        axes.barh(0, size, left=left, color=colour, edgecolor="white", linewidth=1.2, label=name)
        if size / total >= LEAST_LABELLED:
            light = colour == PART_COLOURS[-1]
            axes.text(left + size / 2, 0, format_bytes(size), ha="center", va="center",
                      fontsize=8.5, color=DARK if light else "white")  # fmt: skip
        left += size
    axes.set_xlim(0, total)
    axes.set_axis_off()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, frameon=False,
                fontsize=8, handlelength=1.0, handleheight=1.0)  # fmt: skip


def _part_colours(count: int) -> Sequence[str]:
    # Without a GPU there is no sampling, no CUDA and nothing left alone.
    return PART_COLOURS if count == len(PART_COLOURS) else (*PART_COLOURS[:2], BLUE)


def _draw_sequences(axes: Axes, sizing: Sizing) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    drawn = [_draw_line(axes, sizing.own, own_name(sizing), BLUE, below=False)]
    if sizing.own.shape.groups != sizing.full_cache.shape.groups:
        drawn.append(_draw_line(axes, sizing.full_cache, "full cache", GREY, below=True))
    lengths = sizing.request.lengths
    made_for = sizing.model.max_context
    axes.axvline(made_for, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.text(made_for, 0.02, "  the model's own context", fontsize=8, color=GREY, va="bottom",
              transform=axes.get_xaxis_transform())  # fmt: skip
    ends = [x for line in drawn for x in line] + [made_for]
    axes.set_xlim(min([*lengths, *ends]) / 1.5, max([*lengths, *ends]) * 2.6)
    most = max(max(each.sequences.values()) for each in (sizing.own, sizing.full_cache))
    axes.set_ylim(0.4, max(most, 1) * 1.8)
    axes.xaxis.set_major_locator(FixedLocator(sorted({*lengths})))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_name(round(value))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens of each sequence")
    axes.set_ylabel("sequences at once")
    axes.grid(color="#dee2e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)


def _draw_line(axes: Axes, cache: CacheSizing, name: str, colour: str, *, below: bool) -> list[int]:
    """Draws the counts down to the one sequence that has the memory to itself; its lengths."""
    points = [(length, count) for length, count in sorted(cache.sequences.items()) if count]
    counted = len(points)
    longest = cache.max_context_tokens
    if longest:
        points.append((longest, 1))
    if not points:
        return []
    points.sort(key=lambda point: (point[0], -point[1]))
    lengths, counts = zip(*points, strict=True)
    axes.plot(lengths, counts, color=colour, linewidth=2.0, marker="o", markersize=6,
              markeredgecolor="white", zorder=3, clip_on=False)  # fmt: skip
    for length, count in points[:counted]:
        if length == longest:
            continue
        axes.annotate(str(count), (length, count), xytext=(-5, -6) if below else (5, 6),
                      textcoords="offset points", fontsize=8.5, color=colour,
                      ha="right" if below else "left", va="top" if below else "bottom")  # fmt: skip
    end = f"{name}\n{grouped(longest)} tokens" if longest else name
    axes.annotate(end, points[-1], xytext=(0, -9) if below else (7, 7),
                  textcoords="offset points", fontsize=9, fontweight="bold", color=colour,
                  ha="right" if below else "left", va="top" if below else "bottom")  # fmt: skip
    return list(lengths)
