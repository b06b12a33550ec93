"""Do running decodes wait for a long prompt? Time between tokens while 8192 tokens are computed.

    python benchmarks/prefill_fairness.py

Eight clients stream completions from the embedded model over HTTP. Once all of them run, a ninth
sends a prompt of 8192 tokens. A step computes one chunk of it and one token of each of the eight,
so that none should wait longer than such a step takes: the time that the long prompt took over the
number of its chunks. A short prompt sent right after the long one shows that it does not wait
either.
"""

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from transformers import AutoTokenizer

from headlong.demo.paths import MODEL_DIR
from headlong.profiling.needles import filler
from local_server import BIN, serving


@dataclass(frozen=True)
class Sample:
    """One long prompt: seconds between tokens of the others meanwhile, and of itself."""

    intervals_s: list[float]
    long_ttft_s: float
    short_ttft_s: float


async def stream(
    client: httpx.AsyncClient, prompt: list[int], new_tokens: int, arrivals: list[float]
) -> None:
    """Notes when each chunk of a completion arrives."""
    body = {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            now = time.perf_counter()
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0].get("token_ids"):
                arrivals += [now]


async def measure(url: str, long: list[int], short: list[list[int]], new_tokens: int) -> Sample:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        arrivals: list[list[float]] = [[] for _ in short]
        streams = [
            asyncio.create_task(stream(client, prompt, new_tokens, times))
            for prompt, times in zip(short, arrivals, strict=True)
        ]
        while not all(len(times) > 8 for times in arrivals):
            await asyncio.sleep(0.01)
        first: list[list[float]] = [[], []]
        begin = time.perf_counter()
        newcomers = [asyncio.create_task(stream(client, long, 1, first[0]))]
        await asyncio.sleep(0.05)
        short_begin = time.perf_counter()
        newcomers.append(asyncio.create_task(stream(client, short[0][:64][::-1], 1, first[1])))
        await asyncio.gather(*newcomers)
        end = first[0][0]
        for each in streams:
            each.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    intervals = [
        after - before
        for times in arrivals
        for before, after in itertools.pairwise(times)
        if before < end and after > begin
    ]
    return Sample(intervals, end - begin, first[1][0] - short_begin)


WIDTHS = (12, 20, 11, 12, 11)


def percentile(values: list[float], share: float) -> float:
    """Nearest rank: the smallest value that `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_log = Path(tempfile.gettempdir()) / "headlong-fairness.log"
    parser.add_argument("--decodes", type=int, default=8, help="running streams (default 8)")
    parser.add_argument("--prompt-tokens", type=int, default=8192, help="default 8192")
    parser.add_argument("--chunk", type=int, default=512, help="of the prompt (default 512)")
    parser.add_argument("--rounds", type=int, default=5, help="long prompts (default 5)")
    parser.add_argument("--log", type=Path, default=default_log, help="of the server")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    rng = random.Random(0)
    longs = [
        tokenizer.encode(filler(rng, options.prompt_tokens))[: options.prompt_tokens]
        for _ in range(options.rounds)
    ]
    shorts = [tokenizer.encode(filler(rng, 256))[:256] for _ in range(options.decodes)]
    command = (*(str(BIN / "headlong"), "serve", str(MODEL_DIR)), "--served-model-name", "demo")
    command = (*command, "--chunked-prefill-size", str(options.chunk))
    with serving(command, options.log) as url:
        samples = [asyncio.run(measure(url, long, shorts, 8000)) for long in longs]
    report(samples, options)


def report(samples: list[Sample], options: argparse.Namespace) -> None:
    num_chunks = -(-options.prompt_tokens // options.chunk)
    print(f"{options.decodes} decodes beside a prompt of {options.prompt_tokens} tokens, by round:")
    heads = ("chunk step", "p99 between tokens", "of a step", "TTFT long", "short")
    print("".join(f"{head:>{width}}" for head, width in zip(heads, WIDTHS, strict=True)))
    ratios: list[float] = []
    for sample in samples:
        # Of the same round: a shared machine is now faster and now slower.
        chunk_s = sample.long_ttft_s / num_chunks
        p99_s = percentile(sample.intervals_s, 0.99)
        ratios.append(p99_s / chunk_s)
        print(
            f"{1e3 * chunk_s:>10.1f}ms{1e3 * p99_s:>18.1f}ms{ratios[-1]:>10.2f}x"
            f"{1e3 * sample.long_ttft_s:>10.0f}ms{1e3 * sample.short_ttft_s:>9.0f}ms"
        )
    short = statistics.median(each.short_ttft_s / each.long_ttft_s for each in samples)
    print(f"median p99 between tokens: {statistics.median(ratios):.2f}x one chunk step")
    print(
        json.dumps(
            {
                "benchmark": "prefill_fairness",
                "decodes": options.decodes,
                "prompt_tokens": options.prompt_tokens,
                "chunk": options.chunk,
                "p99_over_step": [round(each, 3) for each in ratios],
                "median_p99_over_step": round(statistics.median(ratios), 3),
                "short_over_long_ttft": round(short, 3),
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
