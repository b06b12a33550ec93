"""``headlong profile``: score a model's KV heads, and look at, compare and convert head profiles.

What is slow to import, PyTorch before all, is imported by the command that needs it.
"""

# ruff: noqa: PLC0415

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from headlong.server.commands import options as opt
from headlong.server.console import console
from headlong.server.engine.engine_config import DType
from headlong.server.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import JsonValue

    from headlong.profiling.method_help import MethodHelp

DEFAULT_PROFILE = Path("profile.json")
SCORE_COMMAND = "score"

_SHOWN = "A profile's JSON file, or a folder of DuoAttention's."


class _ScoresByDefault(TyperGroup):
    """Takes ``headlong profile MODEL ...`` for ``headlong profile score MODEL ...``."""

    # Any: which class a context is depends on the version of typer.
    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["MODEL [OPTIONS] | COMMAND [ARGS]..."]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = [SCORE_COMMAND, *args]
        rest: list[str] = super().parse_args(ctx, args)
        return rest


profile_app = typer.Typer(
    cls=_ScoresByDefault,
    no_args_is_help=True,
    help=(
        "Score a model's KV heads, or look at head profiles.\n\n"
        "headlong profile MODEL scores a model: its options are those of the command score, see "
        "headlong profile score --help. A folder with the name of a command is ./NAME."
    ),
)


@profile_app.command(SCORE_COMMAND)
def score(
    model: Annotated[str, typer.Argument(help="Folder or hub id.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The profile's file.")
    ] = DEFAULT_PROFILE,
    plot: Annotated[Path | None, typer.Option(help="Also draw the head map, as PNG.")] = None,
    method: Annotated[
        str, typer.Option(help="How heads are scored; headlong profile methods lists the ways.")
    ] = "retrieval",
    setting: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE, a setting of the method; may be repeated.", metavar="<str>"),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Fraction of KV heads that stream. Default: the method's own labelling."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Least score of a retrieval head, instead of a sparsity.")
    ] = None,
    sink_size: Annotated[
        int | None,
        typer.Option(help="First tokens that streaming heads keep. Default: the method's."),
    ] = None,
    window_size: Annotated[
        int | None,
        typer.Option(help="Recent tokens that streaming heads keep. Default: the method's."),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Of the weights.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    note: Annotated[str, typer.Option(help="Free text for the profile.")] = "",
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = None,
) -> None:
    """Score a model's KV heads and write its head profile."""
    from headlong.profiling.head_map import head_map_lines, head_summary
    from headlong.profiling.profile_model import make_scorer, run_profiler
    from headlong.profiling.progress import progress_bar

    _check_labelling(sparsity, threshold)
    # Said now, and not after everything has been measured.
    _check_folders(output, plot)
    settings = dict(map(_parse_setting, setting or ()))
    scorer = make_scorer(method, settings, sink_size=sink_size, window_size=window_size)
    if "state_file" in type(scorer).model_fields and "state_file" not in settings:
        # A run of hours must not be lost for want of a flag; another run gets another file.
        run = hashlib.sha256(f"{model} {scorer.settings}".encode()).hexdigest()[:8]
        state_file = output.with_name(f"{output.name}.{method}-{run}.state")
        scorer = scorer.model_copy(update={"state_file": state_file})
        console(stderr=True).print(f"The run is saved in {state_file}: the same command goes on")
    with progress_bar("Scoring heads") as progress:
        made = run_profiler(
            model,
            scorer,
            sink_size=sink_size,
            window_size=window_size,
            sparsity=sparsity,
            threshold=threshold,
            dtype=dtype,
            device=device,
            trust_remote_code=bool(trust_remote_code),
            note=note,
            revision=revision,
            progress=progress,
        )
    made.save(output)
    out = console()
    for line in (*head_map_lines(made.labels()), head_summary(made.labels()), f"Wrote {output}"):
        out.print(line)
    if plot is not None:
        from headlong.profiling.head_plot import plot_head_map

        plot_head_map(made, plot)
        out.print(f"Wrote {plot}")


@profile_app.command()
def show(
    profile: Annotated[Path, typer.Argument(help=_SHOWN)],
    sparsity: opt.Sparsity = None,
    threshold: opt.Threshold = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object.", metavar="")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the head map, as PNG.")] = None,
) -> None:
    """Show a profile's heads, and what memory its labels save."""
    from headlong.profiling.formats import load_head_profile
    from headlong.profiling.inspection import ProfileReport

    _check_labelling(sparsity, threshold)
    _check_folders(plot)
    shown = load_head_profile(profile)
    if sparsity is not None:
        shown = shown.changed(sparsity=sparsity)
    elif threshold is not None:
        shown = shown.changed(threshold=threshold)
    report = ProfileReport.of(shown)
    if plot is not None:
        from headlong.profiling.head_plot import plot_head_map

        plot_head_map(shown, plot)
        console(stderr=as_json).print(f"Wrote {plot}")
    if as_json:
        typer.echo(report.model_dump_json())
        return
    for line in report.lines():
        console().print(line)


@profile_app.command()
def compare(
    first: Annotated[Path, typer.Argument(help=_SHOWN)],
    second: Annotated[Path, typer.Argument(help="Another of the same model.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object.", metavar="")
    ] = False,
) -> None:
    """Compare two profiles of one model: rank correlation, and overlap at each sparsity."""
    from headlong.profiling.compare import compare_profiles
    from headlong.profiling.formats import load_head_profile

    comparison = compare_profiles(load_head_profile(first), load_head_profile(second))
    if as_json:
        typer.echo(comparison.model_dump_json())
        return
    for line in comparison.lines():
        console().print(line)


@profile_app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A profile's JSON file, a folder of DuoAttention's, or Retrieval-Head's JSON file."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="What to write.")],
    to: Annotated[
        Literal["json", "duo"], typer.Option(help="A profile's JSON file or DuoAttention's folder.")
    ] = "json",
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the model, to check the profile against and to write into "
            "it; only its config is read."
        ),
    ] = None,
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    num_kv_heads: Annotated[
        int | None,
        typer.Option(help="KV heads of one layer, for Retrieval-Head's file without --model."),
    ] = None,
    fold: Annotated[
        Literal["max", "mean"],
        typer.Option(help="How the query heads of Retrieval-Head's file become KV heads."),
    ] = "max",
    rescale: Annotated[
        Literal["min-max", "rank"] | None,
        typer.Option(help="Map the scores to 0 to 1, which DuoAttention's files need."),
    ] = None,
    sparsity: opt.Sparsity = None,
    threshold: opt.Threshold = None,
    sink_size: opt.SinkSize = None,
    window_size: opt.WindowSize = None,
) -> None:
    """Convert between our profiles, DuoAttention's folders and Retrieval-Head's scores."""
    from headlong.profiling.convert import read_any_profile, rescaled, write_profile
    from headlong.profiling.profile_model import load_identity

    _check_labelling(sparsity, threshold)
    _check_folders(output)
    identity = None
    if model is not None:
        identity = load_identity(
            model, revision=revision, trust_remote_code=bool(trust_remote_code)
        )
    converted = read_any_profile(source, identity=identity, num_kv_heads=num_kv_heads, fold=fold)
    if rescale is not None:
        converted = rescaled(converted, rescale)
    asked = {
        "sparsity": sparsity,
        "threshold": threshold,
        "sink_size": sink_size,
        "window_size": window_size,
    }
    converted = converted.changed(**{k: v for k, v in asked.items() if v is not None})
    write_profile(converted, output, to)
    console().print(f"Wrote {output}")


@profile_app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, described at length.")] = None,
) -> None:
    """List the methods of scoring and their settings, with defaults."""
    from headlong.profiling.method_help import method_help
    from headlong.profiling.profile_model import SCORERS

    if name is not None and name not in SCORERS:
        raise ConfigError(f"method must be one of {', '.join(SCORERS)}, got {name!r}", "name")
    described = [method_help(SCORERS[one]) for one in ([name] if name else SCORERS)]
    for number, method in enumerate(described):
        if number:
            console().print()
        for line in _method_lines(method, at_length=name is not None):
            console().print(line)


def _method_lines(method: "MethodHelp", *, at_length: bool) -> list[str]:
    lines = [f"{method.name}: {method.summary}"]
    if at_length and method.text:
        lines += ["", method.text, ""]
    lines.append(
        f"  streaming heads keep {method.sink_size} sink tokens and {method.window_size} "
        "recent tokens by default"
    )
    for setting in method.settings:
        lines.append(f"  {setting.name}={setting.default}  ({setting.kind})")
        lines.append(f"      {setting.text}")
    return lines


def _check_labelling(sparsity: float | None, threshold: float | None) -> None:
    if sparsity is not None and threshold is not None:
        raise ConfigError(
            f"give --sparsity or --threshold, not both: got {sparsity} and {threshold}"
        )


def _check_folders(*paths: Path | None) -> None:
    for path in filter(None, paths):
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"cannot write {path}: its folder does not exist")


def _parse_setting(text: str) -> tuple[str, "JsonValue"]:
    name, _, value = text.partition("=")
    return name, opt.setting_value(value)
