"""Headlong on a CUDA device: are the kernels right, and how fast are they and the engine?

    python benchmarks/gpu.py

runs from a checkout and takes 9 minutes at most:

    kernels-check   every kernel against the float64 reference, outputs poisoned
    ceilings        copy and read bandwidth, matrix products
    kernels         attention of a layer, beside torch's FlashAttention and cuDNN
    context         128k and 1M tokens: K and V in fewer bits, chosen pages, the host's memory
    decode          the engine: ms a token and peak memory, 32k to 1M tokens of context
    prefill         the engine: prompts of 128k and 320k tokens in chunks of 32k
    tuning          the kernels with other tiles; only if asked for by --only

What does not fit the device or the time is reported as such. Every measurement is saved at once,
and a second run goes on where the first ended: what was measured on the same device with the same
versions is kept. A table comes last, with a plot beside the JSON. Results worth keeping go, with
the command that made them, to benchmarks/results/.
"""

import argparse
import importlib
import json
import os
import platform
import re
import sys
import time
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from gpu_checkout import ROOT
from gpu_device import CudaDevice, Device
from gpu_session import Results, Session

PARTS = {
    "kernels-check": "gpu_check",
    "ceilings": "gpu_ceilings",
    "kernels": "gpu_kernels",
    "context": "gpu_context",
    "decode": "gpu_decode",
    "prefill": "gpu_prefill",
    "tuning": "gpu_tuning",
}
USUAL = [part for part in PARTS if part != "tuning"]

EXIT_WRONG = 1
EXIT_NO_DEVICE = 2


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.report:
        return report(Results.stored(options.report))
    deadline = time.monotonic() + 60 * options.minutes
    if not options.dry_run and not torch.cuda.is_available():
        print("benchmarks/gpu.py: PyTorch finds no CUDA device here", file=sys.stderr)
        return EXIT_NO_DEVICE
    if options.dry_run:
        # Triton reads it when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    device = Device() if options.dry_run else CudaDevice()
    results = Results(options.output or default_output(device), {**device.describe(), **versions()})
    session = Session(device, results, deadline)
    session.again = options.again or bool(options.only and not options.keep)
    with torch.no_grad():
        for part in options.only or USUAL:
            session.run_part(part, partial(run_part, session, part, options.dry_run))
    return report(results)


def run_part(session: Session, part: str, dry_run: bool) -> None:
    module = importlib.import_module(PARTS[part])
    module.run(session, module.DRY if dry_run else module.REAL)


def report(results: Results) -> int:
    """Draw the plot and print the tables; the exit code."""
    import gpu_report  # noqa: PLC0415

    plot = results.path.with_suffix(".png")
    try:
        import gpu_plot  # noqa: PLC0415

        gpu_plot.draw(results, plot)
        drawn = f"plot: {plot}"
    except Exception as error:
        # The figures are worth more than their picture.
        drawn = f"no plot: {type(error).__name__}: {error}"
    print("", *gpu_report.lines(results), "", f"results: {results.path}", drawn, sep="\n")
    summary = gpu_report.summary(results)
    print(json.dumps(summary))
    return EXIT_WRONG if summary["wrong"] else 0


def default_output(device: Device) -> Path:
    slug = re.sub("[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return ROOT / "build" / f"gpu-{slug}.json"


def versions() -> dict[str, str | None]:
    """Of what the figures depend on."""
    packages = ("torch", "triton", "transformers")
    return {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{package: importlib.import_module(package).__version__ for package in packages},
        "torchao": metadata.version("torchao") if find_spec("torchao") else None,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--only",
        type=_parts,
        action="extend",
        metavar="PART,...",
        help="measure these parts, anew, and keep the others",
    )
    parser.add_argument("--keep", action="store_true", help="with --only: only what is missing")
    parser.add_argument("--again", action="store_true", help="measure everything anew")
    parser.add_argument(
        "--report", type=Path, metavar="JSON", help="measure nothing: table and plot of a file"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default 9)")
    parser.add_argument(
        "--output", type=Path, help="JSON to continue (default build/gpu-<device>.json)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tiny sizes on the CPU, in Triton's interpreter: does it run?",
    )
    return parser.parse_args(arguments)


def _parts(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PARTS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
