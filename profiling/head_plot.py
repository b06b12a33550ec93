"""A profile as a picture: scores as a heat map, retrieval heads marked."""

import io
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from headlong.profiling.files import write_bytes
from headlong.profiling.head_map import head_summary
from headlong.profiling.head_profile import HeadProfile

CELL_INCHES = 0.3
LARGEST_INCHES = 14.0


def plot_head_map(profile: HeadProfile, path: Path) -> None:
    """Draws a PNG with a row for each layer and a column for each KV head.

    Colour is the score; a ring marks a head that the profile's own labelling calls retrieval.

    Args:
        profile: What to draw.
        path: The file to write, whole or not at all.

    Raises:
        ProfileFileError: If the file cannot be written.
    """
    scores = np.array(profile.scores)
    labels = profile.labels()
    num_layers, num_kv_heads = scores.shape
    cell = min(CELL_INCHES, LARGEST_INCHES / max(num_layers, num_kv_heads))
    width = cell * num_kv_heads + 1.8
    height = max(2.4, cell * num_layers + 1.2)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(
        scores, cmap="Blues", vmin=min(0.0, scores.min()), aspect="equal", interpolation="nearest"
    )
    layers, heads = np.nonzero(np.array(labels))
    axes.scatter(
        heads,
        layers,
        s=(cell * 72 * 0.45) ** 2,
        facecolors="none",
        edgecolors="#d9480f",
        linewidths=min(1.2, cell * 4),
    )
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.tick_params(length=0)
    # White lines between the cells.
    axes.set_xticks(np.arange(num_kv_heads + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(num_layers + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=cell * 3)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(
        f"{profile.method}{f', {profile.model.architecture}' if profile.model.architecture else ''}"
        f"\n{head_summary(labels)}",
        fontsize=9,
    )
    bar = figure.colorbar(image, ax=axes, label="score", fraction=0.06, aspect=24)
    bar.ax.spines[:].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, bbox_inches="tight")
    write_bytes(path, buffer.getvalue())
