"""Could blocks of running requests lie in the host's memory? How many does no head choose for long?

    python benchmarks/cold_blocks.py

The embedded model answers needle questions under a retrieval budget, and goes on. A block is a
page of every retrieval head of every layer; counted is the share of a request's blocks that no head
chose in so many generated tokens. With its profile the model has 4 retrieval heads, without 16.
"""

import argparse
import json
import statistics

from selection_cpu import Probe

from headlong.demo.paths import MODEL_DIR
from headlong.profiling.needles import needle_prompts
from headlong.profiling.prompts import encode_prompt, token_counter
from headlong.server.engine.engine import Engine
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=8000, help="tokens (default 8000)")
    parser.add_argument("--budget", type=int, default=1024, help="tokens (default 1024)")
    parser.add_argument("--tokens", type=int, default=32, help="generated (default 32)")
    parser.add_argument("--prompts", type=int, default=4, help="questions (default 4)")
    options = parser.parse_args()
    profiles = {"every head": None, "profile": str(MODEL_DIR / "profile.json")}
    found = {name: measure(profile, options) for name, profile in profiles.items()}
    print(f"blocks that no head chose in {options.tokens} tokens, budget {options.budget}")
    for name, (num_heads, share) in found.items():
        print(f"{name:<12}{num_heads:>4} retrieval heads{share:>8.1%}")
    print(
        json.dumps(
            {
                "benchmark": "cold_blocks",
                **vars(options),
                "never_chosen": {name: round(share, 4) for name, (_, share) in found.items()},
            }
        )
    )


def measure(profile: str | None, options: argparse.Namespace) -> tuple[int, float]:
    """Retrieval heads, and the mean share of blocks that none of them chose."""
    engine = Engine(
        EngineConfig(
            model=str(MODEL_DIR),
            profile=profile,
            device="cpu",
            retrieval_budget=options.budget,
            max_num_seqs=1,
            kv_cache_memory_bytes=256 << 20,
        )
    )
    count_tokens = token_counter(engine.tokenizer, chat=True)
    params = SamplingParams(max_tokens=options.tokens + 1, temperature=0.0, ignore_eos=True)
    shares: list[float] = []
    for prompt in needle_prompts(count_tokens, options.context, options.prompts, 2026, 4):
        ids = encode_prompt(engine.tokenizer, prompt, chat=True).token_ids
        engine.add_request(EngineRequest("cold", ids, params))
        # Prompts are read whole: what is chosen begins with the first generated token.
        while not any(output.num_completion_tokens for output in engine.step()):
            pass
        (sequence,) = engine.scheduler.running
        assert sequence.cache is not None
        blocks = set(sequence.cache.tables[0].blocks)
        with Probe().watching() as probe:
            while engine.has_work:
                engine.step()
        shares.append(len(blocks - probe.blocks) / len(blocks))
    return len(engine.groups[0].members), statistics.mean(shares)


if __name__ == "__main__":
    main()
