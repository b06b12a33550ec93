"""``headlong plan``: what a model takes on a GPU and what that GPU holds, from its config alone.

What is slow to import, PyTorch before all, is imported by the command that needs it.
"""

# ruff: noqa: PLC0415

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from headlong.server.commands.options import takes_settings
from headlong.server.config_sources import Sources
from headlong.server.console import console
from headlong.server.engine_settings import EngineSettings
from headlong.server.errors import ConfigError

if TYPE_CHECKING:
    from headlong.server.engine.engine_config import EngineConfig
    from headlong.server.engine.sizing import EvenHeads, Sizing

PLAN_SETTINGS = (
    "revision",
    "trust_remote_code",
    "profile",
    "sparsity",
    "threshold",
    "sink_size",
    "window_size",
    "dtype",
    "quantization",
    "gpu_memory_utilization",
    "block_size",
    "arena_balance",
    "kv_policy_tokens",
    "kv_cache_dtype",
    "compensation",
    "retrieval_budget",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
)
LENGTHS = "8k,32k,128k,1M"
TABLE_WIDTH = 200
"""Columns of a table that goes to a file or a pipe, which has no width of its own."""

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


@takes_settings(EngineSettings, only=PLAN_SETTINGS)
def plan(
    given: dict[str, object],
    model: Annotated[
        str, typer.Argument(help="Folder, config.json or hub id. No weights are read.")
    ],
    gpu: Annotated[
        str | None,
        typer.Option(
            help="A GPU by name, such as a100-80g, h100-80g, h200, l40s or rtx-4090; or its "
            "memory, such as 80GiB. This or --kv-cache-memory-bytes is needed."
        ),
    ] = None,
    kv_cache_memory_bytes: Annotated[
        int | None,
        typer.Option(help="Size of the KV cache, in place of what a GPU leaves for it."),
    ] = None,
    lengths: Annotated[
        str,
        typer.Option(help="Lengths for which sequences are counted, separated by commas."),
    ] = LENGTHS,
    plot: Annotated[Path | None, typer.Option(help="Also draw the plan, as PNG.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.", metavar="")
    ] = False,
) -> None:
    """Plan a model's memory on a GPU, from its configuration alone.

    Says what weights and activations take, what a token of context takes in each head group, the
    longest context and how many sequences of a length fit, beside a full cache. Neither weights nor
    a GPU are needed; the arithmetic is the engine's own.

    --sparsity without a profile deals streaming heads evenly to the layers, with DuoAttention's
    sink of 128 and window of 256 tokens; with neither, every head keeps its full cache.
    """
    if plot is not None and not plot.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {plot}: its folder does not exist", "plot")
    sources = Sources({**given, "model": model, "kv_cache_memory_bytes": kv_cache_memory_bytes})
    with sources.named():
        config, even = _settings(sources, model)
        wanted = parse_lengths(lengths)

        from headlong.server.engine.gpus import find_gpu
        from headlong.server.engine.sizing import SizingRequest, size_model

        sizing = size_model(
            SizingRequest(
                config=config,
                gpu=None if gpu is None else find_gpu(gpu),
                even=even,
                lengths=wanted,
            )
        )
    if plot is not None:
        from headlong.profiling.files import write_bytes
        from headlong.server.commands.plan_plot import plan_png

        write_bytes(plot, plan_png(sizing))
    _print(sizing, plot, as_json=as_json)


def parse_lengths(text: str) -> tuple[int, ...]:
    """Reads lengths such as "8k,32k,1M": k is 1024 and M 1024 * 1024 tokens.

    Raises:
        ConfigError: One is no length.
    """
    lengths: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,12})([km]?)", part.strip().lower())
        if found is None:
            raise ConfigError(f"lengths: {part.strip()!r} is no length such as 8k", "lengths")
        lengths.append(int(found[1]) * _UNITS[found[2]])
    return tuple(dict.fromkeys(lengths))


def _settings(sources: Sources, model: str) -> "tuple[EngineConfig, EvenHeads | None]":
    settings = sources.read(EngineSettings)
    labels = {"sparsity": None, "sink_size": None, "window_size": None}
    config = settings.model_copy(update=labels).to_engine_config(default_model=model)
    if config.profile is not None or settings.sparsity is None:
        return settings.to_engine_config(default_model=model), None

    from headlong.server.engine.sizing import EvenHeads

    chosen = {name: getattr(settings, name) for name in labels}
    return config, EvenHeads(**{name: value for name, value in chosen.items() if value is not None})


def _print(sizing: "Sizing", plot: Path | None, *, as_json: bool) -> None:
    from headlong.server.commands import plan_report

    if as_json:
        typer.echo(json.dumps(plan_report.plan_json(sizing), indent=2))
        return
    out = console()
    wide = Console(markup=False, highlight=False, width=None if out.is_terminal else TABLE_WIDTH)
    out.print(plan_report.title(sizing))
    out.print()
    wide.print(plan_report.memory_table(sizing))
    out.print()
    wide.print(plan_report.cache_table(sizing))
    out.print()
    for line in (*plan_report.group_lines(sizing), "", *plan_report.notes(sizing)):
        out.print(line)
    if plot is not None:
        out.print(f"Wrote {plot}")
