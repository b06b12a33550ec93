"""Runs the clients that people use against a real server, and says what came of it.

    make conformance

lm_eval: log likelihoods over HTTP equal transformers' to 1e-4. guidellm: a load without an error.
schemathesis: every operation of the OpenAPI document, a thousand cases and more, no 5xx, every
status, content type and schema as documented. headlong_bench: its figures are guidellm's within a
tenth, on a paced server (bench_check.py). The `openai` client is in the ordinary tests.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import bench_check

from headlong.demo.paths import MODEL_DIR
from local_server import BIN, serving

HERE = Path(__file__).parent
MIN_CASES = 1000
MAX_EXAMPLES = 60
BENCH_ROUNDS = 3
# What OpenAPI cannot say, such as that a token id is in the vocabulary, may be refused.
UNCHECKED = "positive_data_acceptance"


class FaultFoundError(Exception):
    """A client found fault with the server."""


def call(command: list[str], log: Path, timeout_s: int) -> str:
    """Runs a client; its output, or what is wrong with it."""
    with log.open("w") as output:
        done = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
            cwd=log.parent,
        )
    text = log.read_text(errors="replace")
    if done.returncode:
        raise FaultFoundError(f"exit code {done.returncode}, see {log}\n{text[-3000:]}")
    return text


def lm_eval(url: str, clients: Path, folder: Path) -> str:
    command = [str(clients / "python"), str(HERE / "lm_eval_check.py"), "--url", url]
    command += ["--model", "demo", "--checkpoint", str(MODEL_DIR), "--folder", str(folder)]
    return call(command, folder / "lm_eval.log", 400).strip().splitlines()[-1]


def guidellm(url: str, clients: Path, folder: Path) -> str:
    report = folder / "guidellm.json"
    command = [str(clients / "guidellm"), "run", "--backend"]
    command += [f"kind=openai_http,target={url},model=demo", "--tokenizer"]
    command += [f"kind=hf_auto,model={MODEL_DIR}", "--data"]
    command += ["kind=synthetic_text,prompt_tokens=128,output_tokens=16", "--profile"]
    command += ["kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=40"]
    command += ["--output", f"kind=json,path={report}"]
    call(command, folder / "guidellm.log", 300)
    totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    if totals["errored"] or totals["successful"] < 40:
        raise FaultFoundError(f"request totals: {totals}")
    return f"guidellm: {totals['successful']} requests, none failed"


def schemathesis(url: str, clients: Path, folder: Path) -> str:
    command = [str(clients / "schemathesis"), "run", f"{url}/openapi.json", "--no-color"]
    command += ["--max-examples", str(MAX_EXAMPLES), "--seed", "1", "--continue-on-failure"]
    command += ["--exclude-checks", UNCHECKED, "--request-timeout", "300"]
    # No database of earlier examples: a run depends on its seed alone.
    command += ["--generation-database", "none"]
    text = call(command, folder / "schemathesis.log", 900)
    found = re.search(r"(\d+) generated", text)
    operations = re.search(r"Tested: (\d+)", text)
    if found is None or operations is None or int(found[1]) < MIN_CASES:
        raise FaultFoundError(f"fewer than {MIN_CASES} cases\n{text[-2000:]}")
    return f"schemathesis: {found[1]} cases over {operations[1]} operations, no failure"


def headlong_bench(_: str, clients: Path, folder: Path) -> str:
    """Beside guidellm, on a server of its own: it must be the same at any load."""
    with bench_check.paced() as url:
        lines, agree = bench_check.compare(bench_check.PACED, url, clients, folder, BENCH_ROUNDS)
    if not agree:
        raise FaultFoundError("\n".join(lines))
    return "\n".join(["headlong bench: agrees with guidellm on a paced server", *lines])


CLIENTS: dict[str, Callable[[str, Path, Path], str]] = {
    "lm_eval": lm_eval,
    "guidellm": guidellm,
    "schemathesis": schemathesis,
    "headlong_bench": headlong_bench,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=Path, required=True, help="bin folder of their venv")
    parser.add_argument("--only", nargs="*", choices=CLIENTS, default=list(CLIENTS))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="headlong-conformance-"))
    # Every head keeps everything, so that transformers computes the same.
    command = (*(str(BIN / "headlong"), "serve", str(MODEL_DIR)), "--profile", "none")
    command += ("--served-model-name", "demo", "--dtype", "float32", "--max-model-len", "1024")
    failed: list[str] = []
    with serving(command, folder / "server.log") as url:
        for name in options.only:
            try:
                print(CLIENTS[name](url, options.clients.resolve(), folder), flush=True)
            except (FaultFoundError, subprocess.TimeoutExpired) as error:
                failed.append(name)
                print(f"{name}: FAILED: {error}", flush=True)
    print(f"{len(options.only) - len(failed)} passed, {len(failed)} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
