"""Which labelling of KV heads keeps the answers? Methods and controls on the embedded model.

    python benchmarks/method_accuracy.py

Every method scores the heads, and at each sparsity the highest-scored ones keep everything. The
embedded model then answers needle questions (a grid of lengths and depths) and RULER-like tasks on
the real engine, greedy, float32, the compressed cache in prefill and in decode. Controls: labels
drawn by chance, and every head streaming (StreamingLLM). This is `headlong eval` twice, with
lengths of their own. A run that was stopped goes on where it was: both reports are kept.
"""

import argparse
import json
import os
import platform
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import JsonValue

from headlong.demo.paths import MODEL_DIR
from headlong.profiling.evaluation_results import EvaluationReport, ScoredMethod
from headlong.profiling.evaluation_summary import SummaryRow, summarize, unsolved
from headlong.profiling.profile_model import SCORERS
from headlong.profiling.progress import progress_bar
from headlong.server.commands.evaluate import draw, method_settings, say_cell
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.evaluation_run import Evaluation, EvaluationRequest

RESULTS = Path(__file__).parent / "results"
SINK_SIZE = 16
WINDOW_SIZE = 128
CONTROLS = ("random", "streaming")

_PROMPTS = {
    "prompt": "needle",
    "num_passkeys": 5,
    "min_context_tokens": 512,
    "max_context_tokens": 2048,
}
SETTINGS: dict[str, dict[str, JsonValue]] = {
    "duo": {**_PROMPTS, "num_steps": 200},
    "attribution": {**_PROMPTS, "num_prompts": 4},
    "ablation": {**_PROMPTS, "num_prompts": 4},
}
"""The embedded model answers needles only, and its heads are told apart in 200 steps, not 2000."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"type": int, "nargs": "+", "metavar": "TOKENS"}
    parser.add_argument("--methods", nargs="+", default=[*SCORERS, *CONTROLS])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.9])
    parser.add_argument(
        "--setting", action="append", default=[], help="METHOD.NAME=VALUE; may be repeated"
    )
    parser.add_argument("--needle-lengths", default=[512, 1024, 2048, 4096, 8192], **numbers)
    parser.add_argument("--needle-prompts", type=int, default=40, help="of each length")
    parser.add_argument("--depths", type=int, default=10, help="that prompts take turns at")
    parser.add_argument("--ruler-tasks", nargs="*", default=["ruler", "threading"])
    parser.add_argument("--ruler-lengths", default=[1024, 4096], **numbers)
    parser.add_argument("--ruler-prompts", type=int, default=10, help="of each task and length")
    parser.add_argument("--seed", type=int, default=2026, help="of the prompts (default 2026)")
    parser.add_argument("--threads", type=int, help="CPU threads; PyTorch's own choice by default")
    parser.add_argument(
        "--reports",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="folder of both reports, from which a run goes on",
    )
    parser.add_argument(
        "--save", action="store_true", help=f"write {RESULTS.name}/method_accuracy.json and .png"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.reports.mkdir(parents=True, exist_ok=True)
    needle = evaluate(
        options,
        "needle",
        tasks=["needle"],
        lengths=options.needle_lengths,
        num_samples=options.needle_prompts,
    )
    reports = {"needle": needle}
    if options.ruler_tasks:
        reports["ruler"] = evaluate(
            options,
            "ruler",
            tasks=options.ruler_tasks,
            lengths=options.ruler_lengths,
            num_samples=options.ruler_prompts,
            scored=needle.methods,
        )
    result = show(options, reports)
    if options.save:
        command = f"python benchmarks/method_accuracy.py {arguments()}".strip()
        path = RESULTS / "method_accuracy.json"
        path.write_text(json.dumps({"command": command, **result}, indent=1) + "\n")
        for name, report in reports.items():
            picture = "method_accuracy" if name == "needle" else f"method_accuracy_{name}"
            draw(report, RESULTS / f"{picture}.png")
    print(json.dumps(result))


def evaluate(
    options: argparse.Namespace,
    name: str,
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    num_samples: int,
    scored: Mapping[str, ScoredMethod] | None = None,
) -> EvaluationReport:
    settings = {name: dict(SETTINGS.get(name, {})) for name in options.methods if name in SCORERS}
    for method, given in method_settings(options.setting, options.methods).items():
        settings[method] |= given
    print(f"{name}: {', '.join(tasks)} at {lengths} tokens, {num_samples} prompts each", flush=True)
    request = EvaluationRequest(
        config=EngineConfig(model=str(MODEL_DIR), device="cpu", max_num_seqs=8),
        tasks=tasks,
        methods=options.methods,
        settings=settings,
        scored=scored or {},
        sparsities=options.sparsities,
        sink_size=SINK_SIZE,
        window_size=WINDOW_SIZE,
        lengths=lengths,
        num_samples=num_samples,
        num_depths=min(options.depths, num_samples),
        seed=options.seed,
        output=options.reports / f"headlong-method-accuracy-{name}.json",
    )
    return Evaluation(request, say_cell, progress_bar).run()


def show(options: argparse.Namespace, reports: Mapping[str, EvaluationReport]) -> dict[str, object]:
    """Prints the table of what was asked for, and gives it back as plain data."""
    rows = {name: wanted(options, report) for name, report in reports.items()}
    groups = list(rows)
    print(
        f"\nembedded model, sink {SINK_SIZE}, window {WINDOW_SIZE}, "
        "compressed in prefill and in decode"
    )
    heading = "".join(f"{f'{name} of full':>26}" for name in groups)
    print(f"{'method':<14}{'sparsity':>9}{'retrieval':>11}{'KV bytes':>11}{'':>7}{heading}")
    for key, row in rows["needle"].items():
        sparsity = "" if row.sparsity is None else f"{row.sparsity:g}"
        heads = f"{row.retrieval_heads}/{row.kv_heads}"
        cells = "".join(f"{kept(rows[name].get(key)):>26}" for name in groups)
        print(
            f"{row.method:<14}{sparsity:>9}{heads:>11}{row.kv_bytes:>11}{row.kv_fraction:>7.1%}"
            f"{cells}"
        )
    scoring = {name: each.scoring_s for name, each in reports["needle"].methods.items()}
    for name, seconds in scoring.items():
        print(f"scoring heads by {name} took {seconds:.1f} s")
    criteria = judge(options, rows["needle"], scoring)
    for name, (wants, found) in criteria.items():
        print(f"{name}: wanted {wants:g}, found {found:.4g}{'' if found >= wants else ', missed'}")
    missed = {name: unsolved(summarize(report.cells)) for name, report in reports.items()}
    for name, tasks in missed.items():
        if tasks:
            told = ", ".join(f"{task} ({accuracy:.1%})" for task, accuracy in tasks.items())
            print(f"{name}: not solved by the full cache and left out: {told}")
    return {
        "benchmark": "method_accuracy",
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": reports["needle"].versions,
        "sink_size": SINK_SIZE,
        "window_size": WINDOW_SIZE,
        "scoring_s": scoring,
        "criteria": {
            name: {"wanted": wants, "found": round(found, 5), "met": found >= wants}
            for name, (wants, found) in criteria.items()
        },
        "evaluations": {
            name: {
                "settings": report.settings.model_dump(mode="json"),
                "not_solved_by_the_full_cache": missed[name],
                "rows": [rounded(row) for row in rows[name].values()],
            }
            for name, report in reports.items()
        },
    }


def wanted(
    options: argparse.Namespace, report: EvaluationReport
) -> dict[tuple[str, float | None], SummaryRow]:
    """Rows of this run, in the order asked for: the report may hold others of an earlier one."""
    order = ["full", *options.methods]
    rows = {
        (row.method, row.sparsity): row
        for row in summarize(report.cells)
        if row.method in ("full", *options.methods)
        and (row.sparsity in (None, *options.sparsities) or row.method == "streaming")
    }
    return dict(sorted(rows.items(), key=lambda row: (order.index(row[0][0]), row[0][1] or 0.0)))


def judge(
    options: argparse.Namespace,
    rows: Mapping[tuple[str, float | None], SummaryRow],
    scoring_s: Mapping[str, float],
) -> dict[str, tuple[float, float]]:
    """What methods ought to reach on the needle grid: by name, what is wanted and what is so."""
    found = {key: row.relative for key, row in rows.items() if row.relative is not None}
    methods = [name for name in options.methods if name in SCORERS]
    criteria: dict[str, tuple[float, float]] = {}
    for sparsity, wants in ((0.5, 0.99), (0.75, 0.95)):
        reached = [found[name, sparsity] for name in methods if (name, sparsity) in found]
        if reached:
            criteria[f"best method at sparsity {sparsity:g}"] = (wants, max(reached))
        if reached and ("random", sparsity) in found:
            margin = min(reached) - found["random", sparsity]
            criteria[f"worst method over mean random labels at {sparsity:g}"] = (0.1, margin)
        if {("duo", sparsity), ("attribution", sparsity)} <= found.keys():
            short = found["attribution", sparsity] - found["duo", sparsity]
            criteria[f"attribution less duo at {sparsity:g}"] = (-0.01, short)
    if {"duo", "attribution"} <= scoring_s.keys():
        ratio = scoring_s["duo"] / scoring_s["attribution"]
        criteria[f"times that attribution is faster than {num_steps()} steps of duo"] = (20, ratio)
    return criteria


def num_steps() -> object:
    return SETTINGS["duo"]["num_steps"]


def kept(row: SummaryRow | None) -> str:
    if row is None or row.relative is None:
        return ""
    if row.runs == 1:
        return f"{row.relative:.1%}"
    return f"{row.relative:.1%} ({row.relative_low:.1%} to {row.relative_high:.1%})"


def rounded(row: SummaryRow) -> dict[str, object]:
    values: dict[str, object] = json.loads(
        json.dumps(row.model_dump(mode="json")), parse_float=lambda text: round(float(text), 5)
    )
    return {key: value for key, value in values.items() if value is not None}


def arguments() -> str:
    """The command line as it was given, without what decides nothing."""
    given = argparse.ArgumentParser(add_help=False)
    given.add_argument("--save", action="store_true")
    given.add_argument("--reports")
    return shlex.join(given.parse_known_args()[1])


if __name__ == "__main__":
    main()
