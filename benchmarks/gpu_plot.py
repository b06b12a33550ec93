"""The plot: attention beside its ceilings, the engine over the context, and what stretches it."""

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from gpu_figures import Parts, ceiling, entries, peers
from gpu_figures_context import PART as CONTEXT
from gpu_layers import short
from gpu_session import Results

mpl.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: dict[object, str] = {
    1.0: "#4c72b0",
    0.5: "#dd8452",
    0.25: "#55a868",
    "torch": "#999999",
}
STYLES = {"gqa": "-o", "mha": "--s"}
GIB = 1 << 30


def draw(results: Results, path: Path) -> None:
    """Draw what there is."""
    figure, axes = plt.subplots(3, 2, figsize=(13, 13), constrained_layout=True)
    parts = results.parts
    _kernel_bars(axes[0][0], parts, "decode")
    _kernel_bars(axes[0][1], parts, "prefill")
    _engine_lines(axes[1][0], parts, "median_ms", 1.0, "ms a token, CUDA graphs")
    _engine_lines(axes[1][1], parts, "peak_bytes", GIB, "peak memory, GiB")
    _context_bars(axes[2][0], parts, "attend", "one layer's attention, us", 1e3)
    _context_bars(axes[2][1], parts, "engine", "engine, ms a token", 1.0)
    figure.suptitle(f"Headlong on {results.machine['name']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _kernel_bars(axes: "Axes", parts: Parts, kind: str) -> None:
    """Rates of one layer's attention by shape: ours by share of retrieval heads, and torch's."""
    field = "bytes_per_s" if kind == "decode" else "flops_per_s"
    ours = [each for each in entries(parts, "kernels", kind=kind) if each.get("block_size") == 16]
    shapes: dict[str, dict[object, float]] = {}
    for entry in ours:
        work = f"{entry['batch']} x" if kind == "decode" else f"{short(entry['chunk'])} of"
        bars = shapes.setdefault(f"{entry['heads']}\n{work} {short(entry['context'])}", {})
        bars[entry["retrieval"]] = entry[field] / 1e12
        for best in peers(parts, entry)[:1]:
            bars["torch"] = best[field] / 1e12
    width = 0.2
    for index, (key, colour) in enumerate(COLOURS.items()):
        places = [
            at + (index - 1.5) * width for at, bars in enumerate(shapes.values()) if key in bars
        ]
        heights = [bars[key] for bars in shapes.values() if key in bars]
        label = "torch's best, all heads" if key == "torch" else f"{key:.0%} retrieval heads"
        axes.bar(places, heights, width, label=label, color=colour)
    for name, style in (("copy", "-"), ("read", ":")) if kind == "decode" else (("matmul", "-"),):
        best_rate = ceiling(parts, name)
        if best_rate is not None:
            axes.axhline(best_rate / 1e12, color="black", linestyle=style, label=name)
    axes.set_xticks(range(len(shapes)), list(shapes), fontsize=7)
    axes.set_title(f"{kind} attention of one layer, {'TB/s' if kind == 'decode' else 'TFLOP/s'}")
    axes.legend(fontsize=7)


def _engine_lines(axes: "Axes", parts: Parts, field: str, unit: float, title: str) -> None:
    """A figure of the engine's decode over the context, a line a model and share."""
    cells = entries(parts, "decode", eager=False)
    lines = dict.fromkeys((each["model"], each["heads"], each["retrieval"]) for each in cells)
    for model, heads, share in lines:
        line = sorted(
            (each["context"], each[field] / unit)
            for each in entries(parts, "decode", eager=False, model=model, retrieval=share)
        )
        style = STYLES.get(heads, "-o")
        axes.plot(
            *zip(*line, strict=True), style, color=COLOURS[share], label=f"{model} {share:.0%}"
        )
    contexts = sorted({each["context"] for each in cells})
    if contexts:
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [short(each) for each in contexts])
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    axes.set_title(f"engine, decode of one sequence: {title}")
    axes.set_xlabel("context, tokens")


def _context_bars(axes: "Axes", parts: Parts, kind: str, title: str, scale: float) -> None:
    """Times of one sequence by format and budget, a bar each context."""
    rows: dict[str, dict[str, float]] = {}
    for entry in entries(parts, CONTEXT, kind=kind):
        if kind == "attend":
            if entry["batch"] > 1 or entry["retrieval"] < 1.0:
                continue
            label = entry["form"] or entry["dtype"]
            if entry["budget"]:
                label += f", budget {entry['budget']}, reuse {entry['reuse']}"
            label += f", block {entry['block_size']}"
        else:
            label = entry["label"]
        rows.setdefault(label, {})[short(entry["context"])] = scale * entry["median_ms"]
    for index, context in enumerate(sorted({each for row in rows.values() for each in row})):
        places = [at + 0.4 * index for at, row in enumerate(rows.values()) if context in row]
        times = [row[context] for row in rows.values() if context in row]
        axes.barh(places, times, 0.4, label=context)
    axes.set_yticks([at + 0.2 for at in range(len(rows))], list(rows), fontsize=7)
    axes.invert_yaxis()
    if rows:
        axes.set_xscale("log")
        axes.legend(fontsize=7)
    axes.set_title(f"more context: {title}")
