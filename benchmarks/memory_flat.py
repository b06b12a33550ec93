"""Does memory stay where the start put it? 500 mixed requests, and the process's peak.

    python benchmarks/memory_flat.py

The engine starts in a process of its own with the embedded model and its profile. Requests of many
lengths, greedy and sampled, with and without log probabilities, some aborted midway, run in batches
of up to 32. The peak is the process's largest resident size, which the kernel keeps.
"""

import argparse
import json
import random
import resource

from headlong.demo.paths import MODEL_DIR
from headlong.server.engine.engine import Engine
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=rng.choice((1, 4, 16, 64)),
        temperature=rng.choice((0.0, 0.7, 1.2)),
        top_p=rng.choice((1.0, 0.9)),
        top_k=rng.choice((0, 20)),
        repetition_penalty=rng.choice((1.0, 1.1)),
        logprobs=rng.choice((None, None, 5)),
        stop=rng.choice(((), ("the",))),
    )


def serve(engine: Engine, num_requests: int, longest_prompt: int, seed: int) -> int:
    rng = random.Random(seed)
    left, started, aborted = num_requests, 0, 0
    open_requests: set[str] = set()
    while left or engine.has_work:
        while left and len(open_requests) < 32:
            length = min(longest_prompt, int(rng.paretovariate(0.7) * 16))
            prompt = [rng.randrange(engine.model.vocab_size) for _ in range(length)]
            engine.add_request(EngineRequest(str(started), prompt, random_params(rng)))
            open_requests.add(str(started))
            left, started = left - 1, started + 1
        for output in engine.step():
            if output.finish_reason is not None:
                open_requests.remove(output.request_id)
        if open_requests and rng.random() < 0.02:
            victim = rng.choice(sorted(open_requests))
            engine.abort(victim)
            open_requests.remove(victim)
            aborted += 1
    return aborted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(MODEL_DIR), help="default: the embedded model")
    parser.add_argument("--profile", help="default: the one beside the embedded model")
    parser.add_argument("--requests", type=int, default=500, help="default 500")
    parser.add_argument("--longest-prompt", type=int, default=8192, help="tokens (default 8192)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    embedded = MODEL_DIR / "profile.json"
    beside = str(embedded) if options.model == str(MODEL_DIR) else None
    engine = Engine(
        EngineConfig(model=options.model, profile=options.profile or beside, device="cpu")
    )
    start = peak_bytes()
    longest = min(options.longest_prompt, engine.max_model_len - 64)
    aborted = serve(engine, options.requests, longest, options.seed)
    end = peak_bytes()
    engine.cache.check_integrity()
    growth = end / start - 1
    print(f"{options.requests} requests, {aborted} of them aborted")
    print(f"peak after start {start / 2**20:.1f} MiB, after serving {end / 2**20:.1f} MiB")
    print(f"growth {growth:.2%}, blocks owned at the end {sum(engine.cache.owned_blocks)}")
    print(
        json.dumps(
            {
                "benchmark": "memory_flat",
                "requests": options.requests,
                "aborted": aborted,
                "peak_after_start_bytes": start,
                "peak_after_serving_bytes": end,
                "growth": round(growth, 5),
                "owned_blocks": sum(engine.cache.owned_blocks),
            }
        )
    )


if __name__ == "__main__":
    main()
