"""Sixteen clients over HTTP: Headlong beside `transformers serve` with continuous batching.

    pip install 'transformers[serving]' accelerate
    python benchmarks/throughput_http.py

Both serve the embedded model in float32 from this machine's CPU, one after the other in each
round. Every client sends one completion request (a prompt of about 1024 tokens, 64 new tokens,
greedy). Throughput counts the completion tokens that the server itself reports. Headlong is
measured with every head a retrieval head, as transformers has it, and with the shipped profile.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from transformers import AutoTokenizer

from headlong.demo.paths import MODEL_DIR
from headlong.profiling.needles import filler
from local_server import BIN, serving


@dataclass(frozen=True)
class Side:
    name: str
    command: tuple[str, ...]
    model: str


@dataclass(frozen=True)
class Sample:
    tokens: int
    seconds: float

    @property
    def throughput(self) -> float:
        return self.tokens / self.seconds


def sides() -> list[Side]:
    alike = ("--device", "cpu", "--dtype", "float32")
    headlong = (
        *(str(BIN / "headlong"), "serve", str(MODEL_DIR), "--served-model-name", "demo"),
        *alike,
    )
    transformers = (str(BIN / "transformers"), "serve", str(MODEL_DIR), "--continuous-batching")
    # Without sizes it plans its cache for a GPU, and answers nothing on a CPU.
    sizes = ("--cb-block-size", "32", "--cb-num-blocks", "1024", "--cb-max-batch-tokens", "2048")
    return [
        Side(
            "transformers serve",
            (*transformers, *alike, *sizes),
            str(MODEL_DIR),
        ),
        Side("headlong, all retrieval", (*headlong, "--profile", "none"), "demo"),
        Side("headlong, its profile", headlong, "demo"),
    ]


def build_prompts(count: int, tokens: int, seed: int) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    rng = random.Random(seed)
    prompts: list[str] = []
    for _ in range(count):
        ids = tokenizer.encode(filler(rng, tokens))[:tokens]
        prompts.append(tokenizer.decode(ids))
    return prompts


async def send(
    client: httpx.AsyncClient, side: Side, url: str, prompts: Sequence[str], new_tokens: int
) -> Sample:
    async def one(prompt: str) -> int:
        body = {
            "model": side.model,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0.0,
            "stream": False,
        }
        response = await client.post(f"{url}/v1/completions", json=body)
        response.raise_for_status()
        return int(response.json()["usage"]["completion_tokens"])

    begin = time.perf_counter()
    tokens = await asyncio.gather(*(one(prompt) for prompt in prompts))
    return Sample(sum(tokens), time.perf_counter() - begin)


async def measure(side: Side, url: str, options: argparse.Namespace, seed: int) -> Sample:
    limits = httpx.Limits(max_connections=options.concurrency)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        await send(client, side, url, build_prompts(2, 64, seed), 4)
        prompts = build_prompts(options.concurrency, options.prompt_tokens, seed)
        return await send(client, side, url, prompts, options.new_tokens)


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
    options = parser.parse_args()
    found: dict[str, list[Sample]] = {side.name: [] for side in sides()}
    for turn in range(options.rounds):
        for side in sides():
            with serving(side.command, options.log) as url:
                found[side.name].append(asyncio.run(measure(side, url, options, turn)))
    report(found, options)


def report(found: dict[str, list[Sample]], options: argparse.Namespace) -> None:
    medians = {
        name: statistics.median(sample.throughput for sample in samples)
        for name, samples in found.items()
    }
    base = next(iter(medians.values()))
    print(
        f"\n{options.concurrency} clients, prompt of {options.prompt_tokens} tokens, "
        f"{options.new_tokens} new tokens, completion tokens a second"
    )
    print(f"{'server':<26}{'median':>9}{'min':>9}{'max':>9}{'tokens':>9}{'ratio':>8}")
    for name, samples in found.items():
        rates = [sample.throughput for sample in samples]
        tokens = samples[-1].tokens
        print(
            f"{name:<26}{medians[name]:>9.1f}{min(rates):>9.1f}{max(rates):>9.1f}"
            f"{tokens:>9}{medians[name] / base:>7.2f}x"
        )
    print(
        json.dumps(
            {
                "benchmark": "throughput_http",
                "concurrency": options.concurrency,
                "prompt_tokens": options.prompt_tokens,
                "new_tokens": options.new_tokens,
                "tokens_per_s": {name: round(rate, 1) for name, rate in medians.items()},
                "ratio": {name: round(rate / base, 3) for name, rate in medians.items()},
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
