"""How much of a step is not the model: HTTP, streams and scheduling at sixteen clients.

    python benchmarks/http_overhead.py

Sixteen clients stream completions from the embedded model. The server counts the seconds that the
model's passes and the sampler take; the rest of the wall time, while all sixteen decode, is
scheduling, detokenizing, sending between processes, HTTP and waiting. The clients run on the same
cores, and their time counts as overhead too.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from headlong.demo.paths import MODEL_DIR
from headlong.profiling.needles import filler
from local_server import BIN, serving

SKIPPED_TOKENS = 8
"""Of each stream, so that no prompt is computed while time is taken."""


@dataclass(frozen=True)
class Reading:
    """Seconds, and steps, of the server so far."""

    at_s: float
    steps: float
    step_s: float
    model_s: float


async def read(client: httpx.AsyncClient) -> Reading:
    text = (await client.get("/metrics")).text
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return Reading(
        time.perf_counter(),
        values["headlong:engine_steps_total"],
        values["headlong:engine_step_seconds_total"],
        values["headlong:engine_model_seconds_total"],
    )


async def stream(client: httpx.AsyncClient, prompt: list[int], tokens: list[int]) -> None:
    body = {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": 8000,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for data in response.aiter_bytes():
            tokens[0] += data.count(b"data: ")


async def measure(url: str, prompts: list[list[int]], steps: int) -> tuple[Reading, Reading]:
    limits = httpx.Limits(max_connections=len(prompts) + 1)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        counts = [[0] for _ in prompts]
        streams = [
            asyncio.create_task(stream(client, prompt, count))
            for prompt, count in zip(prompts, counts, strict=True)
        ]
        while min(count[0] for count in counts) < SKIPPED_TOKENS:
            await asyncio.sleep(0.02)
        first = last = await read(client)
        while last.steps - first.steps < steps:
            await asyncio.sleep(0.2)
            last = await read(client)
        for each in streams:
            each.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    return first, last


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_log = Path(tempfile.gettempdir()) / "headlong-overhead.log"
    parser.add_argument("--streams", type=int, default=16, help="clients (default 16)")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="default 1024")
    parser.add_argument("--steps", type=int, default=300, help="measured (default 300)")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--log", type=Path, default=default_log, help="of the server")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    rng = random.Random(0)
    prompts = [
        tokenizer.encode(filler(rng, options.prompt_tokens))[: options.prompt_tokens]
        for _ in range(options.streams)
    ]
    command = (*(str(BIN / "headlong"), "serve", str(MODEL_DIR)), "--served-model-name", "demo")
    with serving(command, options.log) as url:
        found = [asyncio.run(measure(url, prompts, options.steps)) for _ in range(options.rounds)]
    report(found, options)


def report(found: list[tuple[Reading, Reading]], options: argparse.Namespace) -> None:
    print(f"{options.streams} streams, prompts of {options.prompt_tokens} tokens, per step:")
    print(f"{'round':>5}{'wall':>10}{'in step()':>11}{'in model':>10}{'overhead':>10}")
    shares: list[float] = []
    for turn, (first, last) in enumerate(found):
        steps = last.steps - first.steps
        wall, step, model = (
            1e3 * (getattr(last, name) - getattr(first, name)) / steps
            for name in ("at_s", "step_s", "model_s")
        )
        shares.append(1 - model / wall)
        print(f"{turn + 1:>5}{wall:>8.2f}ms{step:>9.2f}ms{model:>8.2f}ms{shares[-1]:>9.1%}")
    print(f"median share of a step that is not the model: {statistics.median(shares):.1%}")
    print(
        json.dumps(
            {
                "benchmark": "http_overhead",
                "streams": options.streams,
                "prompt_tokens": options.prompt_tokens,
                "overhead_share": [round(share, 4) for share in shares],
                "median_overhead_share": round(statistics.median(shares), 4),
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
