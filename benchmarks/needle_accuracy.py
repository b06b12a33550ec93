"""Does the compressed cache keep the answers? The embedded model, on the real engine.

    python benchmarks/needle_accuracy.py

Held-out needle questions at one context length, through the chat template, greedy, float32, with
the compressed cache in prefill and in decode. Three labellings take turns: every head a retrieval
head; the profile's highest-scored heads; as many of its lowest-scored heads. KV bytes are those of
the blocks that one sequence owns after its prompt, read off the block tables.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.progress import track

from headlong.demo.paths import MODEL_DIR
from headlong.profiling.evaluation import needle_accuracy
from headlong.profiling.head_profile import HeadProfile
from headlong.server.engine.engine import Engine
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Row:
    labelling: str
    retrieval_heads: int
    kv_heads: int
    accuracy: float
    kv_bytes: int


class Side:
    """An engine that answers one prompt at a time and notes the bytes each one owns."""

    def __init__(self, profile: Path | None, sparsity: float | None, context: int) -> None:
        self.engine = Engine(
            EngineConfig(
                model=str(MODEL_DIR),
                profile=None if profile is None else str(profile),
                sparsity=sparsity,
                max_num_seqs=1,
                max_model_len=context + 64,
                kv_cache_memory_bytes=256 << 20,
            )
        )
        self.kv_bytes: list[int] = []

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        return [self.answer(prompt, max_new_tokens) for prompt in track(prompts)]

    def answer(self, prompt: Sequence[int], max_new_tokens: int) -> str:
        params = SamplingParams(max_tokens=max_new_tokens, temperature=0.0)
        self.engine.add_request(EngineRequest("needle", prompt, params))
        text = ""
        first = True
        while self.engine.has_work:
            for output in self.engine.step():
                text += output.text
                if first:
                    self.kv_bytes.append(self.engine.cache.owned_bytes)
                first = False
        return text


def negated(profile: HeadProfile, folder: Path) -> Path:
    """The same profile upside down: its highest scores are the other's lowest."""
    scores = tuple(tuple(-score for score in row) for row in profile.scores)
    path = folder / "lowest.json"
    profile.model_copy(update={"scores": scores, "method": "lowest"}).save(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=8192, help="tokens (default 8192)")
    parser.add_argument("--prompts", type=int, default=200, help="questions (default 200)")
    parser.add_argument("--sparsity", type=float, help="default: the profile's own")
    parser.add_argument("--seed", type=int, default=2026, help="of the questions (default 2026)")
    parser.add_argument("--completion", action="store_true", help="complete, do not chat")
    options = parser.parse_args()
    shipped = MODEL_DIR / "profile.json"
    profile = HeadProfile.load(shipped)
    sparsity = options.sparsity if options.sparsity is not None else profile.sparsity
    with tempfile.TemporaryDirectory() as scratch:
        labellings = {
            "all retrieval": (None, None),
            "highest scores": (shipped, sparsity),
            "lowest scores": (negated(profile, Path(scratch)), sparsity),
        }
        rows = [
            measure(name, path, sparsity, options) for name, (path, sparsity) in labellings.items()
        ]
    report(rows, profile, options)


def measure(
    name: str, profile: Path | None, sparsity: float | None, options: argparse.Namespace
) -> Row:
    side = Side(profile, sparsity, options.context)
    result = needle_accuracy(
        side.generate,
        side.engine.tokenizer,
        options.context,
        options.prompts,
        options.seed,
        chat=not options.completion,
    )
    print(f"{name}: {result.accuracy:.1%} answered", flush=True)
    keeping = [len(group.members) for group in side.engine.groups if group.policy.keeps_all]
    geometry = side.engine.model.geometry
    return Row(
        labelling=name,
        retrieval_heads=sum(keeping),
        kv_heads=geometry.num_layers * geometry.num_kv_heads,
        accuracy=result.accuracy,
        kv_bytes=max(side.kv_bytes),
    )


def report(rows: Sequence[Row], profile: HeadProfile, options: argparse.Namespace) -> None:
    full = rows[0]
    print(
        f"\nneedle questions: {options.prompts} at {options.context} tokens, "
        f"{'completion' if options.completion else 'chat'}, sink {profile.sink_size}, "
        f"window {profile.window_size}"
    )
    print(
        f"{'labelling':<16}{'retrieval':>11}{'accuracy':>10}{'of full':>9}{'KV bytes':>12}{'':>8}"
    )
    for row in rows:
        heads = f"{row.retrieval_heads}/{row.kv_heads}"
        print(
            f"{row.labelling:<16}{heads:>11}{row.accuracy:>10.1%}"
            f"{row.accuracy / full.accuracy if full.accuracy else 0:>9.1%}"
            f"{row.kv_bytes:>12}{row.kv_bytes / full.kv_bytes:>8.1%}"
        )
    print(
        json.dumps(
            {
                "benchmark": "needle_accuracy",
                "context_tokens": options.context,
                "prompts": options.prompts,
                "seed": options.seed,
                "sink_size": profile.sink_size,
                "window_size": profile.window_size,
                "rows": [asdict(row) for row in rows],
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
