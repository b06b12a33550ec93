"""What does each way of keeping more context cost? Each alone and all together, the embedded model.

    python benchmarks/context_accuracy.py

One model in bfloat16 on the real engine, greedy, compressed in prefill and in decode. Accuracy is
of a needle grid (lengths by depths) and of those RULER-like tasks that this model solves with its
full cache, in points of 100. KL is KL(full bfloat16 cache || row) in nats over tokens of held-out
text that follow a long context, decoded one by one, as an answer is. Bytes are those of one more
token of context, and those of a whole sequence of the longest needle prompts between steps. What a
budget saves is reading, not bytes. A host tier moves the same bytes: its tests are exact, it has no
row.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from headlong.demo.paths import MODEL_DIR
from headlong.profiling.evaluation_tasks import Question, run_task, write_questions
from headlong.profiling.needles import needle_prompts
from headlong.profiling.prompts import encode_prompt, token_counter
from headlong.profiling.tasks.registry import TASKS
from headlong.server.engine.decode_scores import score_decodes
from headlong.server.engine.engine import Engine
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.evaluate import EngineAnswers
from headlong.server.engine.model import LoadedModel, load_model

PROFILE = str(MODEL_DIR / "profile.json")
RULER = ("niah_single", "niah_multikey", "qa")
"""Of several values or questions, and of chains, it gets too few right to lose any."""

BUDGET = 1024
TOGETHER: Mapping[str, object] = {
    "profile": PROFILE,
    "kv_cache_dtype": "int4",
    "quantization": "int8wo",
    "compensation": "on",
    "retrieval_budget": BUDGET,
    "host_cache_bytes": 64 << 20,
}
ROWS: Mapping[str, Mapping[str, object]] = {
    "full bfloat16": {},
    "head profile": {"profile": PROFILE},
    "fp8 KV": {"kv_cache_dtype": "fp8"},
    "int8 KV": {"kv_cache_dtype": "int8"},
    "int4 KV": {"kv_cache_dtype": "int4"},
    "int8 weights": {"quantization": "int8wo"},
    "int4 weights": {"quantization": "int4wo"},
    "profile, compensation": {"profile": PROFILE, "compensation": "on"},
    "profile, compensation in layer 0": {
        "profile": PROFILE,
        "compensation": "on",
        "compensation_from_layer": 0,
    },
    f"budget {BUDGET}": {"retrieval_budget": BUDGET},
    f"budget {BUDGET}, reused 4 steps": {"retrieval_budget": BUDGET, "selection_reuse_steps": 4},
    "all together": TOGETHER,
    "all but compensation": {**TOGETHER, "compensation": "off"},
}


@dataclass(frozen=True)
class Row:
    """What one setting keeps.

    Attributes:
        name: For people.
        needle: Accuracy over the needle grid, 0 to 1.
        tasks: Accuracy of each RULER-like task, 0 to 1.
        kl: KL(full || this), nats a token; None of the full cache itself.
        token_bytes: Bytes of one more token of context.
        sequence_bytes: Bytes of a sequence of the longest prompts.
        seconds: What measuring took.
    """

    name: str
    needle: float
    tasks: dict[str, float]
    kl: float | None
    token_bytes: int
    sequence_bytes: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"type": int, "nargs": "+", "metavar": "TOKENS"}
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--needle-lengths", default=[1024, 2048, 4096, 8192], **numbers)
    parser.add_argument("--needle-prompts", type=int, default=50, help="of each length")
    parser.add_argument("--depths", type=int, default=10)
    parser.add_argument("--ruler-lengths", default=[1024, 4096], **numbers)
    parser.add_argument("--ruler-prompts", type=int, default=30, help="of each task and length")
    parser.add_argument("--kl-prompts", type=int, default=8, help="contexts (default 8)")
    parser.add_argument("--kl-context", type=int, default=4096, help="tokens before (default 4096)")
    parser.add_argument("--kl-tokens", type=int, default=64, help="decoded of each (default 64)")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--save", type=Path, help="where the result goes, too")
    options = parser.parse_args()
    base = EngineConfig(
        model=str(MODEL_DIR),
        dtype="bfloat16",
        device="cpu",
        max_num_seqs=8,
        max_model_len=max(*options.needle_lengths, *options.ruler_lengths) + 256,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=True,
    )
    models: dict[object, LoadedModel] = {}
    rows: list[Row] = []
    truth: list[torch.Tensor] = []
    names = ["full bfloat16", *(name for name in options.rows if name != "full bfloat16")]
    for name in names:
        config = replace(base, **ROWS[name])  # type: ignore[arg-type]
        if config.quantization not in models:
            models[config.quantization] = load_model(config)
        row, scores = measure(name, config, models[config.quantization], options, truth)
        truth = truth or scores
        rows.append(row)
        print(f"{name}: measured in {row.seconds:.0f} s", flush=True)
    report(rows, options)


def measure(
    name: str,
    config: EngineConfig,
    model: LoadedModel,
    options: argparse.Namespace,
    truth: Sequence[torch.Tensor],
) -> tuple[Row, list[torch.Tensor]]:
    """One row, and the log probabilities behind its KL."""
    started = time.perf_counter()
    engine = Engine(config, model)
    answers = EngineAnswers(engine)

    def accuracy(task: str, questions: Sequence[Question]) -> float:
        return run_task(TASKS[task], questions, answers, chat=True).accuracy

    def questions(task: str, lengths: Sequence[int], count: int) -> list[Question]:
        depths = min(options.depths, count)
        return write_questions(
            TASKS[task], engine.tokenizer, lengths, count, depths, options.seed, chat=True
        )

    needle = accuracy("needle", questions("needle", options.needle_lengths, options.needle_prompts))
    tasks = {
        task: accuracy(task, questions(task, options.ruler_lengths, options.ruler_prompts))
        for task in RULER
    }
    scores = [
        torch.log_softmax(score_decodes(engine, prompt, text).float(), dim=-1)
        for prompt, text in texts(engine, options)
    ]
    kl = None
    if truth:
        distances = [(p.exp() * (p - q)).sum(-1) for p, q in zip(truth, scores, strict=True)]
        kl = float(torch.cat(distances).mean())
    shape = engine.plan.shape
    row = Row(
        name=name,
        needle=needle,
        tasks=tasks,
        kl=kl,
        token_bytes=shape.growing_token_bytes,
        sequence_bytes=shape.sequence_bytes(max(options.needle_lengths)),
        seconds=time.perf_counter() - started,
    )
    return row, scores


def texts(engine: Engine, options: argparse.Namespace) -> list[tuple[list[int], list[int]]]:
    """Contexts and the text that goes on from there; the same for every row."""
    whole = options.kl_context + options.kl_tokens
    prompts = needle_prompts(
        token_counter(engine.tokenizer, chat=True), whole, options.kl_prompts, options.seed + 1, 4
    )
    found: list[tuple[list[int], list[int]]] = []
    for prompt in prompts:
        tokens = list(encode_prompt(engine.tokenizer, prompt, chat=True).token_ids)
        found.append((tokens[: -options.kl_tokens], tokens[-options.kl_tokens :]))
    return found


def report(rows: Sequence[Row], options: argparse.Namespace) -> None:
    full = rows[0]
    print(f"\nembedded model, bfloat16; RULER-like: {', '.join(RULER)}")
    print(
        f"{'':<34}{'needle':>8}{'ruler':>8}{'mean loss':>11}{'KL, nats':>10}{'B/token':>9}"
        f"{'of full':>9}{'B/sequence':>12}{'of full':>9}"
    )
    told = []
    for row in rows:
        ruler = mean(row.tasks.values())
        points = 100 * (full.needle + mean(full.tasks.values()) - row.needle - ruler) / 2
        kl = "" if row.kl is None else f"{row.kl:.2e}"
        print(
            f"{row.name:<34}{row.needle:>8.1%}{ruler:>8.1%}{points:>11.2f}{kl:>10}"
            f"{row.token_bytes:>9}{row.token_bytes / full.token_bytes:>9.3f}"
            f"{row.sequence_bytes:>12}{row.sequence_bytes / full.sequence_bytes:>9.3f}"
        )
        told.append({**asdict(row), "ruler": ruler, "points_lost": round(points, 3)})
    result = {
        "benchmark": "context_accuracy",
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "settings": {
            name: value if not isinstance(value, Path) else value.name
            for name, value in vars(options).items()
        },
        "rows": told,
    }
    if options.save is not None:
        options.save.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
