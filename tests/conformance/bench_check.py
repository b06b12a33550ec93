"""`headlong bench` and guidellm put the same load on one server, turn by turn.

    PYTHONPATH=benchmarks python tests/conformance/bench_check.py --clients .venv-clients/bin

Eight clients, prompts of random tokens. Both count the same requests; guidellm's
"inter token latency" of a request is its time after the first token by its tokens but one, which is
our TPOT. Medians over the rounds must agree within a tenth.

The server that decides is a paced one: it computes nothing and answers when its clock says, so that
its latencies do not depend on who asks. A real server on the same cores is slowed by whatever its
client computes, and guidellm computes more: --real shows those figures for long prompts and a
server of one thread, which leaves the clients a core, and nobody judges them.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from headlong.demo.paths import MODEL_DIR
from local_server import BIN, serving

STREAMS = 8
MOST_APART = 0.10
TIMEOUT_S = 300

FIRST_TOKEN_S, NEXT_TOKEN_S = 0.4, 0.03
"""Of the paced server; the n-th of the requests that come together is later by a part of the one
and slower by a part of the other, so that there is something to average."""

Figures = dict[str, float]


@dataclass(frozen=True)
class Load:
    """What each of the clients' requests is, and how many there are."""

    prompt_tokens: int
    output_tokens: int
    requests: int


PACED = Load(prompt_tokens=512, output_tokens=32, requests=64)
REAL = Load(prompt_tokens=4096, output_tokens=64, requests=32)


async def answer_in_time(request: web.Request) -> web.StreamResponse:
    """Streams as many tokens as are asked for, each when it is due."""
    begin = asyncio.get_running_loop().time()
    body = await request.json()
    count, part = body["max_tokens"], request.app["turns"].pop(0)
    request.app["turns"].append(part)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    due = begin + FIRST_TOKEN_S * (1 + part)
    for index in range(count):
        await asyncio.sleep(due - asyncio.get_running_loop().time())
        due += NEXT_TOKEN_S * (1 + part)
        finish = "length" if index == count - 1 else None
        await say(response, choices=[{"index": 0, "text": f" w{index}", "finish_reason": finish}])
    counts = {"prompt_tokens": PACED.prompt_tokens, "completion_tokens": count}
    counts["total_tokens"] = PACED.prompt_tokens + count
    await say(response, choices=[], usage=counts)
    await response.write(b"data: [DONE]\n\n")
    return response


async def say(response: web.StreamResponse, **fields: object) -> None:
    chunk = {"id": "paced", "object": "text_completion", "created": 0, "model": "demo", **fields}
    await response.write(f"data: {json.dumps(chunk)}\n\n".encode())


async def models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "demo", "object": "model"}]})


async def health(request: web.Request) -> web.Response:
    return web.Response()


@contextmanager
def paced() -> Iterator[str]:
    """The paced server on a thread of its own; yields its address."""
    app = web.Application()
    app["turns"] = [index / STREAMS for index in range(STREAMS)]
    app.router.add_post("/v1/completions", answer_in_time)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/health", health)
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(runner.cleanup())
        loop.close()


def headlong(load: Load, url: str, folder: Path, seed: int) -> Figures:
    report = folder / f"headlong-{seed}.json"
    command = [str(BIN / "headlong"), "bench", url, "--tokenizer", str(MODEL_DIR)]
    command += ["--num-prompts", str(load.requests), "--max-concurrency", str(STREAMS)]
    command += ["--random-input-len", str(load.prompt_tokens), "--seed", str(seed)]
    command += ["--random-output-len", str(load.output_tokens), "--output", str(report)]
    call(command, folder / "headlong.log")
    summary = json.loads(report.read_text())["runs"][0]["summary"]
    assert summary["num_completed"] == load.requests, summary["errors"]
    return {
        "TTFT, ms": summary["ttft_ms"]["mean"],
        "ITL, ms": summary["tpot_ms"]["mean"],
        "E2E, ms": summary["e2e_ms"]["mean"],
        "output tok/s": summary["output_throughput"],
    }


def guidellm(load: Load, clients: Path, url: str, folder: Path, seed: int) -> Figures:
    report = folder / f"guidellm-{seed}.json"
    backend = f"kind=openai_http,target={url},model=demo,request_format=/v1/completions"
    data = f"kind=synthetic_text,prompt_tokens={load.prompt_tokens}"
    data += f",output_tokens={load.output_tokens}"
    command = [str(clients / "guidellm"), "run", "--backend", backend]
    command += ["--tokenizer", f"kind=hf_auto,model={MODEL_DIR}", "--data", data]
    command += [
        "--profile",
        f"kind=concurrent,streams={STREAMS}",
        "--seed",
        f"kind=static,value={seed}",
    ]
    command += ["--constraint", f"kind=max_requests,count={load.requests}"]
    command += ["--output", f"kind=json,path={report}"]
    call(command, folder / "guidellm.log")
    metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    assert totals["successful"] == load.requests, totals

    def mean(name: str) -> float:
        return float(metrics[name]["successful"]["mean"])

    return {
        "TTFT, ms": mean("time_to_first_token_ms"),
        "ITL, ms": mean("inter_token_latency_ms"),
        "E2E, ms": 1e3 * mean("request_latency"),
        "output tok/s": mean("output_tokens_per_second"),
    }


def call(command: list[str], log: Path) -> None:
    # One process of workers, as ours has: the others would compete with the server.
    environment = {**os.environ, "GUIDELLM__MAX_WORKER_PROCESSES": "1"}
    with log.open("w") as output:
        done = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=False,
            env=environment,
            cwd=log.parent,
        )
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}\n{log.read_text()[-3000:]}")


def compare(
    load: Load, url: str, clients: Path, folder: Path, rounds: int
) -> tuple[list[str], bool]:
    """Lines of a table, and whether all figures agree."""
    sides: dict[str, Callable[[int], Figures]] = {
        "headlong bench": lambda seed: headlong(load, url, folder, seed),
        "guidellm": lambda seed: guidellm(load, clients, url, folder, seed),
    }
    found: dict[str, list[Figures]] = {name: [] for name in sides}
    for turn in range(rounds):
        # Whoever comes first changes from round to round.
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(sides[name](turn + 1))
    lines = [f"{'median of the rounds':<22}{'headlong bench':>16}{'guidellm':>12}{'ratio':>8}"]
    agree = True
    for figure in found["guidellm"][0]:
        ours, theirs = (
            statistics.median(each[figure] for each in samples) for samples in found.values()
        )
        agree = agree and abs(ours / theirs - 1.0) <= MOST_APART
        lines.append(f"{figure:<22}{ours:>16.2f}{theirs:>12.2f}{ours / theirs:>7.3f}x")
    return lines, agree


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=Path, required=True, help="bin folder of their venv")
    parser.add_argument("--rounds", type=int, default=3, help="of each (default 3)")
    parser.add_argument("--real", action="store_true", help="measure a real server, too")
    options = parser.parse_args()
    clients = options.clients.resolve()
    folder = Path(tempfile.mkdtemp(prefix="headlong-bench-check-"))
    with paced() as url:
        lines, agree = compare(PACED, url, clients, folder, options.rounds)
    print("A paced server:", *lines, sep="\n")
    if options.real:
        command = ("env", "OMP_NUM_THREADS=1", str(BIN / "headlong"), "serve", str(MODEL_DIR))
        command += ("--served-model-name", "demo")
        with serving(command, folder / "server.log") as url:
            lines, _ = compare(REAL, url, clients, folder, options.rounds)
        print("A real server on the clients' cores:", *lines, sep="\n")
    print("the figures agree" if agree else f"figures differ by more than {MOST_APART:.0%}")
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
