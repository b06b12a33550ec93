"""Decode at a long context on a CPU: the engine beside transformers' `generate`.

    python benchmarks/decode_cpu.py

A random Llama-shaped model (8 layers, hidden 512, 8 query and 4 KV heads of 64, float32) continues
a context of 32768 tokens. Three sides take turns in one process: transformers (DynamicCache, SDPA),
the engine with every head a retrieval head, and the engine with half of the KV heads streaming
(sink 16, window 256). Prefill is not measured, so all caches are filled with random values.

What bounds a decode step is reading the cache once: 2 * 8 layers * 4 heads * 64 * 4 B = 16 KiB a
token, 512 MiB at 32768 tokens, half of it with half of the heads streaming.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedTokenizerFast
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from headlong.kernels.layout import view_pages
from headlong.profiling.head_profile import HeadProfile
from headlong.profiling.model_identity import ModelIdentity
from headlong.server.engine.engine import Engine
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams

CONFIG = LlamaConfig(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    vocab_size=8192,
    max_position_embeddings=1 << 17,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)


class Clock(StoppingCriteria):
    """Notes when each token was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def intervals(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def transformers_side(folder: Path, context: int, tokens: int) -> Callable[[], list[float]]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    prompt = torch.randint(CONFIG.vocab_size, (1, context))
    shape = (1, CONFIG.num_key_value_heads, context - 1, CONFIG.head_dim)
    filled = [(torch.randn(shape), torch.randn(shape)) for _ in range(CONFIG.num_hidden_layers)]

    def measure() -> list[float]:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(filled):
            cache.update(key, value, layer)
        clock = Clock()
        model.generate(
            prompt,
            past_key_values=cache,
            max_new_tokens=tokens + 2,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        # the first step copies the given cache, the second grows it for the first time
        return intervals(clock.times)[1:]

    return measure


def engine_side(
    folder: Path, context: int, tokens: int, profile: Path | None, block_size: int
) -> Callable[[], list[float]]:
    engine = Engine(
        EngineConfig(
            model=str(folder),
            device="cpu",
            profile=None if profile is None else str(profile),
            block_size=block_size,
            max_num_seqs=1,
            max_model_len=context + 4096,
            kv_cache_memory_bytes=1 << 30,
        )
    )
    for group in range(engine.arena.layout.num_groups):
        pages = view_pages(engine.arena.layout, engine.arena.memory, group)
        pages.keys.normal_()
        pages.values.normal_()
    params = SamplingParams(max_tokens=tokens + 2, temperature=0.0, ignore_eos=True)
    prompt = torch.randint(CONFIG.vocab_size, (context,)).tolist()

    def measure() -> list[float]:
        engine.add_request(EngineRequest("r", prompt[:1], params))
        # A context of which all but the last token counts as computed: blocks, no forward pass.
        (sequence,) = engine.scheduler.waiting
        sequence.token_ids[:] = prompt
        sequence.num_prompt_tokens = context
        while sequence.num_pending_tokens > 1:
            engine.scheduler.max_num_batched_tokens = min(2048, sequence.num_pending_tokens - 1)
            engine.scheduler.advance(engine.scheduler.schedule())
        times: list[float] = []
        while engine.has_work:
            engine.step()
            times.append(time.perf_counter())
        return intervals(times)[1:]

    return measure


def half_streaming_profile(folder: Path, model: LlamaConfig) -> Path:
    heads = model.num_key_value_heads
    profile = HeadProfile(
        model=ModelIdentity.from_config(model),
        method="half",
        scores=((1.0,) * (heads // 2) + (0.0,) * (heads - heads // 2),) * model.num_hidden_layers,
        sink_size=16,
        window_size=256,
        threshold=0.5,
    )
    path = folder / "half.json"
    profile.save(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--context", type=int, default=32768, help="tokens (default 32768)")
    parser.add_argument("--tokens", type=int, default=8, help="decoded a round (default 8)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default 5)")
    parser.add_argument("--block-size", type=int, default=16, help="tokens a page (default 16)")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).save_pretrained(folder)
        save_tokenizer(folder)
        half = half_streaming_profile(folder, CONFIG)
        common = (folder, options.context, options.tokens)
        sides = {
            "transformers": transformers_side(*common),
            "all retrieval": engine_side(*common, None, options.block_size),
            "half streaming": engine_side(*common, half, options.block_size),
        }
        found: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, measure in sides.items():
                found[name] += measure()
    report(found, options)


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models  # noqa: PLC0415

    words = {f"w{index}": index for index in range(CONFIG.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def report(found: dict[str, list[float]], options: argparse.Namespace) -> None:
    medians = {name: statistics.median(times) * 1e3 for name, times in found.items()}
    base = medians["transformers"]
    print(f"\ndecode of one sequence, {options.context} tokens of context, float32, ms a token")
    print(f"{'side':<16}{'median':>9}{'min':>9}{'max':>9}{'speed':>9}")
    for name, times in found.items():
        print(
            f"{name:<16}{medians[name]:>9.1f}{min(times) * 1e3:>9.1f}{max(times) * 1e3:>9.1f}"
            f"{base / medians[name]:>8.2f}x"
        )
    print(
        json.dumps(
            {
                "benchmark": "decode_cpu",
                "context_tokens": options.context,
                "block_size": options.block_size,
                "median_ms": {name: round(value, 2) for name, value in medians.items()},
                "speed_over_transformers": {
                    name: round(base / value, 3) for name, value in medians.items()
                },
                "threads": torch.get_num_threads(),
                "cpu": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
