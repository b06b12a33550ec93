"""``headlong eval``: what a compressed cache costs in answers, and a gate for a user's own CI.

What is slow to import, PyTorch before all, is imported by the command that needs it.
"""

# ruff: noqa: PLC0415

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

from headlong.server.commands.options import setting_value, takes_settings
from headlong.server.config_sources import Sources
from headlong.server.console import console
from headlong.server.engine_settings import EngineSettings
from headlong.server.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import JsonValue

    from headlong.profiling.evaluation_gate import Judgement
    from headlong.profiling.evaluation_results import EvaluationReport
    from headlong.profiling.evaluation_sweep import CellDone
    from headlong.server.engine.engine_config import EngineConfig
    from headlong.server.engine.evaluation_run import EvaluationRequest

EXIT_BELOW = 1
EVAL_MAX_NUM_SEQS = 8
ENGINE_SETTINGS = (
    "revision",
    "trust_remote_code",
    "device",
    "dtype",
    "attention_backend",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "block_size",
    "max_num_batched_tokens",
)
TABLE_WIDTH = 200
"""Columns of a table that goes to a file or a pipe, which has no width of its own."""

T = TypeVar("T")

_TASKS = (
    "needle, multi_needle, niah_single, niah_multikey, niah_multivalue, niah_multiquery, vt, cwe, "
    "fwe, qa, threading; ruler and all stand for several; perplexity and kl read --text and "
    "--prompts. Separated by commas."
)


@takes_settings(EngineSettings, only=ENGINE_SETTINGS)
def evaluate(
    given: dict[str, object],
    model: Annotated[str, typer.Argument(help="Folder or hub id.")],
    task: Annotated[str, typer.Option(help=_TASKS)] = "needle",
    profile: Annotated[
        list[Path] | None,
        typer.Option(
            help="Head profile to judge; may be repeated. By default the model folder's "
            "profile.json, unless there are --methods.",
            metavar="<path>",
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods to score on the spot (headlong profile methods lists them), and the "
            "controls random (5 seeds) and streaming (every head streams: StreamingLLM). "
            "Separated by commas."
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="METHOD.NAME=VALUE, a setting of a method; NAME=VALUE if one is scored. May be "
            "repeated.",
            metavar="<str>",
        ),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            help="Fractions of KV heads that stream, separated by commas. By default a profile's "
            "own labelling, and 0.25,0.5,0.75,0.9 of methods. 0 is the full cache, which is "
            "always measured."
        ),
    ] = None,
    sink_size: Annotated[
        int | None,
        typer.Option(
            help="First tokens that streaming heads keep. By default the profile's, and 128 of "
            "methods, so that they are compared alike."
        ),
    ] = None,
    window_size: Annotated[
        int | None,
        typer.Option(
            help="Recent tokens that streaming heads keep. By default the profile's, and 256 of "
            "methods."
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Prompt lengths in tokens, separated by commas. By default those of "
            "512,1024,2048,4096 that the model has room for."
        ),
    ] = None,
    depths: Annotated[
        int, typer.Option(help="Depths, from start to end, that prompts take turns at.")
    ] = 5,
    samples: Annotated[
        int,
        typer.Option(help="Prompts of each task and length; also the most windows of --text."),
    ] = 20,
    seed: Annotated[int, typer.Option(help="Which prompts.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Use the chat template; by default if the model has one."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text file, for perplexity; cut into windows of the longest length."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='Prompts for kl: one a line, or in a .jsonl file the "prompt" of each line. '
            "By default the windows of --text."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="JSON of everything; what it already holds is not measured anew."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw accuracy against KV bytes, as PNG, and beside it NAME-TASK.png with the "
            "grid of lengths and depths of each task that has one."
        ),
    ] = None,
    require: Annotated[
        float | None,
        typer.Option(
            help="Exit with 1 if accuracy relative to the full cache, over the tasks that it "
            "solves, is below this for a profile (without profiles: for a method) at any "
            "sparsity asked for. Without a task that is answered, with kl alone, the top-1 "
            "agreement is judged. What -o keeps of earlier runs plays no part."
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(help="Most prompts that run at once.")
    ] = EVAL_MAX_NUM_SEQS,
) -> None:
    """Measure what a compressed cache answers, next to the full cache.

    All prompts go through the serving engine, which uses the compressed cache in prefill and in
    decode. Published figures often prefill with full attention, which is easier.

    Exits with 0 if all went well, with 1 if what --require asks is not met or the run failed, and
    with 2 if an argument, a file or the model cannot be used, or the requirement cannot be judged.
    """
    if plot is not None and not plot.absolute().parent.is_dir():
        # Said now, and not after everything has been measured.
        raise ConfigError(f"cannot write {plot}: its folder does not exist")
    if require is not None and not 0.0 <= require < math.inf:
        raise ConfigError(f"require must be 0 or more, got {require}", "require")
    named = _split("methods", methods, str)
    sources = Sources({**given, "model": model, "max_num_seqs": max_num_seqs})
    with sources.named():
        engine_config = sources.read(EngineSettings).to_engine_config(default_model=model)
    profiles = list(profile or ())
    if not profiles and not named:
        profiles = [_own_profile(engine_config)]

    from headlong.server.engine.evaluation_run import EvaluationRequest

    request = EvaluationRequest(
        config=engine_config,
        tasks=_split("task", task, str),
        profiles=profiles,
        methods=named,
        settings=method_settings(setting or [], named),
        sparsities=_split("sparsity", sparsity, float),
        sink_size=sink_size,
        window_size=window_size,
        lengths=_split("lengths", lengths, int) or None,
        num_samples=samples,
        num_depths=depths,
        seed=seed,
        chat=chat,
        text=text,
        prompts=prompts,
        output=output,
    )
    if not run_and_show(request, plot, require):
        raise typer.Exit(EXIT_BELOW)


def run_and_show(
    request: "EvaluationRequest", plot: Path | None = None, require: float | None = None
) -> bool:
    """Runs an evaluation, says every cell on standard error, and prints and draws the results.

    The table and the requirement are about what is asked for now; a picture shows all that the
    report holds.

    Args:
        request: What is asked.
        plot: Where to draw, if at all.
        require: Least relative accuracy, if there is one.

    Returns:
        Whether the requirement, if there is one, is met.

    Raises:
        ValueError: A name, a file or a value cannot be used, or the requirement cannot be judged.
        HeadlongError: The model cannot be loaded or run.
    """
    from headlong.profiling.eval_table import notes, summary_table
    from headlong.profiling.evaluation_gate import check_requirement, judge
    from headlong.profiling.evaluation_summary import summarize
    from headlong.profiling.progress import progress_bar
    from headlong.server.engine.evaluation_run import Evaluation

    evaluation = Evaluation(request, say_cell, progress_bar)
    if require is not None:
        check_requirement(evaluation.judged, request.sparsities, evaluation.tasks)
    report = evaluation.run()
    rows = summarize(evaluation.cells)
    out = console()
    wide = Console(markup=False, highlight=False, width=None if out.is_terminal else TABLE_WIDTH)
    wide.print(summary_table(rows))
    for line in notes(rows):
        out.print(line)
    others = sum(cell not in evaluation.cells for cell in report.cells)
    if others:
        out.print(f"Kept from earlier runs in the report, and not shown here: {others} results")
    if request.output is not None:
        out.print(f"Wrote {request.output}")
    if plot is not None:
        for path in draw(report, plot):
            out.print(f"Wrote {path}")
    if require is None:
        return True
    return _meets(judge(rows, evaluation.judged, evaluation.tasks), require)


def draw(report: "EvaluationReport", path: Path) -> list[Path]:
    """Draws accuracy against KV bytes, and the grid of each task that has one.

    Returns:
        The files.
    """
    from headlong.profiling.eval_plot import plot_accuracy, plot_grid
    from headlong.profiling.evaluation_summary import summarize

    plot_accuracy(summarize(report.cells), path)
    written = [path]
    for task in dict.fromkeys(cell.task for cell in report.cells if cell.result.grid):
        beside = path.with_name(f"{path.stem}-{task}{path.suffix}")
        plot_grid([cell for cell in report.cells if cell.task == task], beside)
        written.append(beside)
    return written


def _meets(judgement: "Judgement", require: float) -> bool:
    errors = console(stderr=True)
    if judgement.left_out:
        named = ", ".join(f"{task} ({each:.1%})" for task, each in judgement.left_out.items())
        errors.print(f"The requirement leaves out what the full cache does not solve: {named}")
    if judgement.kept >= require:
        return True
    errors.print(f"headlong: {judgement.sentence}, and {require:g} is required")
    return False


def say_cell(done: "CellDone") -> None:
    """Says on standard error what came of a cell, and about how long the rest takes."""
    tokens = done.result.tokens
    if tokens is None:
        found = f"{done.result.accuracy:.1%}"
    else:
        found = f"perplexity {tokens.perplexity:.4g}, KL {tokens.kl_nats:.4g} nats"
    took = f"{done.result.wall_s:.1f} s" if done.measured else "known"
    left = f", about {_duration(done.left_s)} left" if done.left_s else ""
    console(stderr=True).print(
        f"[{done.number}/{done.total}] {done.title}: {done.task} {found} ({took}{left})"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _own_profile(config: "EngineConfig") -> Path:
    if config.profile is None:
        raise ConfigError(
            f"{config.model} brings no profile.json: give --profile or --methods", "profile"
        )
    return Path(config.profile)


def _split(option: str, value: str | None, kind: Callable[[str], T]) -> list[T]:
    """Reads values separated by commas."""
    parts = [part.strip() for part in (value or "").split(",")]
    try:
        return [kind(part) for part in parts if part]
    except ValueError as error:
        raise ConfigError(f"{option}: {value!r} is no list of numbers", option) from error


def method_settings(
    texts: Sequence[str], methods: Sequence[str]
) -> "dict[str, dict[str, JsonValue]]":
    """Reads settings of methods.

    Args:
        texts: Each ``METHOD.NAME=VALUE``, or ``NAME=VALUE`` if one method is scored.
        methods: The methods and controls.

    Returns:
        By method and name; a value is JSON, or else text.

    Raises:
        ConfigError: A text is neither.
    """
    settings: dict[str, dict[str, JsonValue]] = {}
    scored = [name for name in methods if name not in ("random", "streaming")]
    for text in texts:
        name, equals, value = text.partition("=")
        method, dot, field = name.partition(".")
        if not dot:
            if len(scored) != 1:
                raise ConfigError(
                    f"setting {text!r}: write METHOD.NAME=VALUE where not just one method is scored"
                )
            method, field = scored[0], name
        if not equals or not field:
            raise ConfigError(f"setting {text!r}: write METHOD.NAME=VALUE")
        settings.setdefault(method, {})[field] = setting_value(value)
    return settings
