"""``headlong bench``: load on any OpenAI endpoint, and what came of it.

What is slow to import is imported by the command that needs it.
"""

# ruff: noqa: PLC0415

import asyncio
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from headlong.server.commands import bench_options as opt
from headlong.server.config import ServerConfig, key_fault, read_environment
from headlong.server.console import console
from headlong.server.errors import ConfigError

if TYPE_CHECKING:
    from headlong.loadtest.bench import BenchSettings
    from headlong.loadtest.client import Client
    from headlong.loadtest.report import Config, Report
    from headlong.loadtest.tokens import Tokenizer

EXIT_ALL_FAILED = 1
EXIT_INTERRUPTED = 130
RUN_COMMAND = "run"
TABLE_WIDTH = 160
"""Where output is no terminal, whose width is known."""

_LIMIT = re.compile(r"[a-z0-9]+:[^:/]*")


class _RunsByDefault(TyperGroup):
    """Takes ``headlong bench URL ...`` for ``headlong bench run URL ...``.

    As in vLLM's bench, ``--goodput`` takes all the limits that follow it.
    """

    # Any: which class a context is depends on the version of typer.
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands:
            args = [RUN_COMMAND, *args]
        rest: list[str] = super().parse_args(ctx, _repeat_goodput(args))
        return rest


def _repeat_goodput(args: Sequence[str]) -> list[str]:
    """Puts the option before each limit that follows another."""
    found: list[str] = []
    for arg in args:
        if found[-2:-1] == ["--goodput"] and _LIMIT.fullmatch(arg):
            found.append("--goodput")
        found.append(arg)
    return found


bench_app = typer.Typer(
    cls=_RunsByDefault,
    no_args_is_help=True,
    help="Put load on an OpenAI endpoint, or compare two reports of it.",
)


@bench_app.command(
    RUN_COMMAND,
    epilog=(
        "headlong bench compare A.json B.json lays two reports side by side. "
        "The word run can be left out: headlong bench URL."
    ),
)
def run(
    url: opt.Url = None,
    base_url: opt.BaseUrl = None,
    model: opt.Model = None,
    endpoint: opt.Endpoint = None,
    api_key: opt.ApiKey = None,
    api_key_file: opt.ApiKeyFile = None,
    timeout: opt.Timeout = 600.0,
    request_rate: opt.RequestRate = None,
    max_concurrency: opt.MaxConcurrency = None,
    num_prompts: opt.NumPrompts = None,
    num_warmups: opt.NumWarmups = 0,
    arrivals: opt.Arrivals = None,
    burstiness: opt.Burstiness = None,
    ramp_up_start_rps: opt.RampUpStartRps = None,
    ramp_up_duration: opt.RampUpDuration = None,
    workload: opt.Workload = None,
    tokenizer: opt.Tokenizer = None,
    random_input_len: opt.RandomInputLen = None,
    random_output_len: opt.RandomOutputLen = None,
    random_range_ratio: opt.RandomRangeRatio = None,
    num_prefixes: opt.NumPrefixes = None,
    prefix_len: opt.PrefixLen = None,
    suffix_len: opt.SuffixLen = None,
    num_turns: opt.NumTurns = None,
    document_len: opt.DocumentLen = None,
    shared_document: opt.SharedDocument = False,
    context_len: opt.ContextLen = None,
    output_len: opt.OutputLen = None,
    trace: opt.Trace = None,
    trace_speed: opt.TraceSpeed = None,
    trace_timestamp_unit: opt.TraceTimestampUnit = None,
    trace_block_size: opt.TraceBlockSize = None,
    ignore_eos: opt.IgnoreEos = None,
    seed: opt.Seed = 0,
    goodput: opt.Goodput = None,
    output: opt.Output = None,
    save_detailed: opt.SaveDetailed = False,
    plot: opt.Plot = None,
) -> None:
    """Put load on an OpenAI endpoint and report its latencies, throughput and errors.

    The endpoint is Headlong's or any other's. Ctrl-C ends a test and still reports.

    Exits with 0 if the test ran, with 1 if no request was completed, with 2 if an argument or a
    file cannot be used or the endpoint cannot be reached, and with 130 after Ctrl-C.
    """
    given = locals()

    from headlong.loadtest.bench import BenchSettings
    from headlong.loadtest.client import Client
    from headlong.loadtest.goodput import parse_goodput

    if url is not None and base_url is not None:
        raise ConfigError(f"--base-url {base_url} and the URL {url} contradict each other")
    if save_detailed and output is None:
        raise ConfigError("--save-detailed needs --output")
    if not 0.0 < timeout < float("inf"):
        raise ConfigError(f"--timeout must be above 0 and finite, got {timeout:g}")
    _check_files(output, plot, trace)
    settings = BenchSettings(
        workload=workload or ("random" if trace is None else "trace"),
        shape=_shape(given),
        num_prompts=num_prompts,
        num_warmups=num_warmups,
        endpoint=endpoint,
        ignore_eos=ignore_eos,
        request_rates=tuple(request_rate or ()),
        arrivals=arrivals,
        burstiness=burstiness,
        ramp_up_start_rps=ramp_up_start_rps,
        ramp_up_duration=ramp_up_duration,
        max_concurrency=max_concurrency,
        goodput=parse_goodput(goodput) if goodput else None,
        seed=seed,
    )
    client = Client(
        url or base_url or "http://127.0.0.1:8000",
        model,
        api_key=_api_key(api_key, api_key_file),
        timeout_s=timeout,
    )
    counter = _load_tokenizer(tokenizer)
    report = asyncio.run(_drive(client, settings, counter, _config(client, settings, tokenizer)))
    _show(report)
    _write(report, output, plot, detailed=save_detailed)
    if any(each.summary.interrupted for each in report.runs):
        raise typer.Exit(EXIT_INTERRUPTED)
    if not any(each.summary.num_completed for each in report.runs):
        raise typer.Exit(EXIT_ALL_FAILED)


@bench_app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A report of headlong bench.", metavar="A.json")],
    second: Annotated[Path, typer.Argument(help="Another.", metavar="B.json")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object.", metavar="")
    ] = False,
) -> None:
    """Lay two reports side by side: both figures, their difference and ratio, which is better."""
    from headlong.loadtest.compare import compare_reports, comparison_table
    from headlong.loadtest.report import Report

    found = compare_reports(Report.load(first), Report.load(second))
    if as_json:
        typer.echo(found.to_json())
        return
    names = (first.stem, second.stem) if first.stem != second.stem else ("first", "second")
    for comparison in found.comparisons:
        _tables().print(comparison_table(comparison, names))
    for warning in found.warnings:
        console(stderr=True).print(f"Note: {warning}")


def _shape(given: dict[str, Any]) -> dict[str, Any]:
    """The options of workloads that were given."""
    from headlong.loadtest.bench import SHAPES

    names = dict.fromkeys(name for shape in SHAPES.values() for name in shape)
    return {
        name: value
        for name in names
        if (value := given[name]) not in (None, []) and value is not False
    }


def _check_files(output: Path | None, plot: Path | None, trace: Path | None) -> None:
    """Refuses what could not or must not be written, before everything has been measured."""
    if plot is not None and plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot must name a .png file, got {plot}")
    if output is not None and plot is not None and output.absolute() == plot.absolute():
        raise ConfigError(f"--output and --plot name the same file, {output}")
    for path in (output, plot):
        if path is None:
            continue
        if trace is not None and path.resolve() == trace.resolve():
            raise ConfigError(f"cannot write {path}: it is the trace")
        if path.is_dir():
            raise ConfigError(f"cannot write {path}: it is a folder")
        folder = path.absolute().parent
        if not folder.is_dir():
            raise ConfigError(f"cannot write {path}: its folder does not exist")
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _api_key(key: str | None, path: Path | None) -> str | None:
    if key is not None and path is not None:
        raise ConfigError("--api-key and --api-key-file contradict each other")
    name = "--api-key"
    if path is not None:
        name = f"--api-key-file {path}"
        try:
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError(f"{name} cannot be read: {reason}") from error
    if key is None:
        found = read_environment(ServerConfig).get("api_key")
        if not isinstance(found, str):
            return None
        # A server may know several; any of them opens it.
        name, key = "HEADLONG_API_KEY", found.partition(",")[0]
    if (fault := key_fault(key)) is not None:
        raise ConfigError(f"{name}: the key {fault}")
    return key


def _load_tokenizer(name: str | None) -> "Tokenizer":
    if name is None:
        from headlong.loadtest.tokens import WordTokenizer

        return WordTokenizer()
    from headlong.loadtest.hub_tokenizer import load_tokenizer

    return load_tokenizer(name)


def _config(client: "Client", settings: "BenchSettings", tokenizer: str | None) -> "Config":
    """What the report says of the command."""
    from importlib.metadata import version

    return {
        "base_url": client.url,
        "tokenizer": tokenizer,
        "timeout_s": client.timeout_s,
        "headlong_version": version("headlong"),
        **settings.config(),
    }


async def _drive(
    client: "Client", settings: "BenchSettings", tokenizer: "Tokenizer", config: "Config"
) -> "Report":
    from headlong.loadtest.bench import run_bench

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        # A second time it ends at once, as it does before the start.
        loop.remove_signal_handler(signal.SIGINT)

    def on_start() -> None:
        loop.add_signal_handler(signal.SIGINT, interrupt)

    async with client:
        return await run_bench(client, settings, tokenizer, config, stop=stop, on_start=on_start)


def _show(report: "Report") -> None:
    from headlong.loadtest.report import latency_table, summary_lines, sweep_table

    out, errors = console(), console(stderr=True)
    is_sweep = len(report.runs) > 1
    if is_sweep:
        _tables().print(sweep_table(report.runs))
    for each in report.runs:
        if not is_sweep:
            _tables().print(latency_table(each.summary))
            for line in summary_lines(each.summary):
                out.print(line)
        rate = each.summary.asked_rate
        at = f"at {rate:g}/s: " if is_sweep else ""
        for warning in (*each.summary.warnings(), *each.failures()):
            errors.print(f"Note: {at}{warning}")
    if report.config["approximate_lengths"]:
        errors.print(
            "Note: without --tokenizer prompts are counted in words: see the tokens above for "
            "how long they were"
        )


def _write(report: "Report", output: Path | None, plot: Path | None, *, detailed: bool) -> None:
    out = console()
    if output is not None:
        (report if detailed else report.without_requests()).save(output)
        out.print(f"Wrote {output}")
    if plot is not None:
        from headlong.loadtest.plots import plot_report

        for path in plot_report(report, plot):
            out.print(f"Wrote {path}")


def _tables() -> Console:
    wide = None if sys.stdout.isatty() else TABLE_WIDTH
    return Console(markup=False, highlight=False, width=wide)
