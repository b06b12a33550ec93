"""Sixteen clients over HTTP: Headlong beside `transformers serve` with continuous batching.

    pip install 'transformers[serving]' accelerate
    python benchmarks/throughput_http.py

Both serve the embedded model in float32 from this machine's CPU, one after the other in each
round, and both are driven by what `headlong bench` is made of. Every client sends one completion
request (a prompt of about 1024 tokens, 64 new tokens, greedy, streamed). Throughput counts the
completion tokens that the server itself reports. Headlong is measured with every head a retrieval
head, as transformers has it, and with the shipped profile.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from headlong.demo.paths import MODEL_DIR
from headlong.loadtest.client import Client
from headlong.loadtest.figures import Summary, summarize
from headlong.loadtest.runner import Plan, run_load
from headlong.loadtest.workload import Session, Turn, Workload
from headlong.profiling.needles import filler
from local_server import BIN, serving


@dataclass(frozen=True)
class Side:
    name: str
    command: tuple[str, ...]
    model: str


def sides(transformers: Path) -> list[Side]:
    alike = ("--device", "cpu", "--dtype", "float32")
    headlong = (
        *(str(BIN / "headlong"), "serve", str(MODEL_DIR), "--served-model-name", "demo"),
        *alike,
    )
    peer = (str(transformers), "serve", str(MODEL_DIR), "--continuous-batching")
    # Without sizes it plans its cache for a GPU, and answers nothing on a CPU.
    sizes = ("--cb-block-size", "32", "--cb-num-blocks", "1024", "--cb-max-batch-tokens", "2048")
    return [
        Side("transformers serve", (*peer, *alike, *sizes), str(MODEL_DIR)),
        Side("headlong, all retrieval", (*headlong, "--profile", "none"), "demo"),
        Side("headlong, its profile", headlong, "demo"),
    ]


def build_sessions(count: int, tokens: int, new_tokens: int, seed: int) -> list[Session]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    rng = random.Random(seed)
    prompts = [
        tokenizer.decode(tokenizer.encode(filler(rng, tokens))[:tokens]) for _ in range(count)
    ]
    return [Session((Turn(prompt, new_tokens),)) for prompt in prompts]


async def measure(side: Side, url: str, options: argparse.Namespace, seed: int) -> Summary:
    warm_up = build_sessions(2, 64, 4, seed)
    sessions = build_sessions(options.concurrency, options.prompt_tokens, options.new_tokens, seed)
    plan = Plan(concurrency=options.concurrency)
    async with Client(url, side.model) as client:
        await client.check(chat=False, ignore_eos=False)
        result = await run_load(Workload("prose", sessions), client, plan, warm_up=warm_up)
    summary = summarize(result)
    if summary.errors or summary.num_uncounted:
        details = {record.detail for record in result.records if record.error}
        raise SystemExit(f"{side.name}: {summary.errors}, {'; '.join(details) or 'no token count'}")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_log = Path(tempfile.gettempdir()) / "headlong-throughput.log"
    parser.add_argument("--concurrency", type=int, default=16, help="clients (default 16)")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="default 1024")
    parser.add_argument("--new-tokens", type=int, default=64, help="default 64")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default 3)")
    parser.add_argument("--log", type=Path, default=default_log, help="of the servers")
    parser.add_argument(
        "--transformers", type=Path, default=BIN / "transformers", help="its command"
    )
    options = parser.parse_args()
    compared = sides(options.transformers)
    found: dict[str, list[Summary]] = {side.name: [] for side in compared}
    for turn in range(options.rounds):
        for side in compared:
            with serving(side.command, options.log) as url:
                found[side.name].append(asyncio.run(measure(side, url, options, turn)))
    report(found, options)


def report(found: dict[str, list[Summary]], options: argparse.Namespace) -> None:
    rates = {
        name: [summary.output_throughput for summary in summaries]
        for name, summaries in found.items()
    }
    medians = {name: statistics.median(each) for name, each in rates.items()}
    ttfts = {name: median_of(summaries, "ttft_ms") for name, summaries in found.items()}
    itls = {name: median_of(summaries, "itl_ms") for name, summaries in found.items()}
    base = next(iter(medians.values()))
    print(
        f"\n{options.concurrency} clients, prompt of {options.prompt_tokens} tokens, "
        f"{options.new_tokens} new tokens, completion tokens a second"
    )
    columns = ("median", "min", "max", "tokens", "TTFT, ms", "ITL, ms", "ratio")
    print(f"{'server':<26}" + "".join(f"{column:>10}" for column in columns))
    for name, summaries in found.items():
        print(
            f"{name:<26}{medians[name]:>10.1f}{min(rates[name]):>10.1f}{max(rates[name]):>10.1f}"
            f"{summaries[-1].num_output_tokens:>10}{ttfts[name]:>10.1f}{itls[name]:>10.2f}"
            f"{medians[name] / base:>9.2f}x"
        )
    print(
        json.dumps(
            {
                "benchmark": "throughput_http",
                "concurrency": options.concurrency,
                "prompt_tokens": options.prompt_tokens,
                "new_tokens": options.new_tokens,
                "tokens_per_s": {name: round(rate, 1) for name, rate in medians.items()},
                "ttft_p50_ms": {name: round(each, 1) for name, each in ttfts.items()},
                "itl_p50_ms": {name: round(each, 2) for name, each in itls.items()},
                "ratio": {name: round(rate / base, 3) for name, rate in medians.items()},
                "cores": os.cpu_count(),
            }
        )
    )


def median_of(summaries: list[Summary], latency: str) -> float:
    return statistics.median(getattr(summary, latency).p50 for summary in summaries)


if __name__ == "__main__":
    main()
