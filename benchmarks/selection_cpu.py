"""Decode under a retrieval budget at growing contexts on a CPU, beside reading everything.

    python benchmarks/selection_cpu.py

A random Llama-shaped model (4 layers, hidden 512, 16 query and 8 KV heads of 64, float32) continues
contexts of 4096, 16384 and 65536 tokens. Two engines take turns: one reads every page, the other
those that each KV head chooses for each token, 1024 tokens of them. Prefill is not measured, so all
caches are filled with random keys and values, and with the bounds of these.

A dense step reads 2 * 4 layers * 8 heads * 64 * 4 B = 16 KiB a token of context, 1 GiB at 65536
tokens; a step with a budget reads 16 MiB, and bounds of 4 KiB a page: of 128 spans and 256 pages at
most for each head. Blocks that no head of any layer chose in 32 steps are what could lie elsewhere.
Random keys spread choices as no text does: that share is a lower bound.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from headlong.kernels.layout import SPAN_BLOCKS, view_pages
from headlong.kernels.torch_attention import TorchAttention
from headlong.kernels.torch_selection import TorchSelection
from headlong.server.engine.engine import Engine
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams

mpl.use("Agg")
from matplotlib import pyplot as plt

NUM_LAYERS, NUM_KV_HEADS = 4, 8

CONFIG = LlamaConfig(
    hidden_size=512,
    intermediate_size=512,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=16,
    num_key_value_heads=NUM_KV_HEADS,
    head_dim=64,
    vocab_size=1024,
    max_position_embeddings=1 << 17,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)


@dataclass
class Measured:
    """What a side took.

    Attributes:
        step_s: Seconds of each step.
        cpu_s: Seconds of the processor that each step took, which other work does not lengthen.
        attention_s: Seconds of each step in attention.
        unchosen: Share of the context's blocks that no head chose, a round each.
    """

    step_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    attention_s: list[float] = field(default_factory=list)
    unchosen: list[float] = field(default_factory=list)


class Probe:
    """Times attention and notes the blocks that are chosen, until it is left."""

    def __init__(self) -> None:
        self.attention_s = 0.0
        self.blocks: set[int] = set()

    @contextmanager
    def watching(self) -> Iterator["Probe"]:
        attend, append, choose = TorchAttention.attend, TorchAttention.append, TorchSelection.choose

        def timed(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                before = time.perf_counter()
                result = method(*arguments, **options)
                self.attention_s += time.perf_counter() - before
                return result

            return call

        def noted(*arguments: Any, **options: Any) -> torch.Tensor:
            chosen = choose(*arguments, **options)
            self.blocks.update(chosen.flatten().tolist())
            return chosen

        TorchAttention.attend = timed(attend)  # type: ignore[method-assign]
        TorchAttention.append = timed(append)  # type: ignore[method-assign]
        TorchSelection.choose = noted  # type: ignore[method-assign]
        try:
            yield self
        finally:
            TorchAttention.attend = attend  # type: ignore[method-assign]
            TorchAttention.append = append  # type: ignore[method-assign]
            TorchSelection.choose = choose  # type: ignore[method-assign]


class Side:
    """An engine, and random contexts for it.

    Args:
        folder: The model.
        budget: Tokens; None reads everything.
        options: Of the command line.
    """

    def __init__(self, folder: Path, budget: int | None, options: argparse.Namespace) -> None:
        longest = max(options.contexts)
        token_bytes = 2 * 4 * 64 * NUM_LAYERS * NUM_KV_HEADS
        self._engine = Engine(
            EngineConfig(
                model=str(folder),
                device="cpu",
                block_size=options.block_size,
                max_num_seqs=1,
                max_model_len=longest + 256,
                # Bounds take 4 keys for the 2 * block_size of a page.
                kv_cache_memory_bytes=int((longest + 1024) * token_bytes * 1.2),
                retrieval_budget=budget,
            )
        )
        self._budget = budget
        views = view_pages(self._engine.arena.layout, self._engine.arena.memory, 0)
        views.keys.normal_()
        views.values.normal_()

    def measure(self, context: int, tokens: int, found: Measured) -> None:
        """Decode after a random context of which all but the last token counts as computed."""
        engine = self._engine
        params = SamplingParams(max_tokens=tokens + 2, temperature=0.0, ignore_eos=True)
        prompt = torch.randint(CONFIG.vocab_size, (context,)).tolist()
        engine.add_request(EngineRequest("r", prompt[:1], params))
        (sequence,) = engine.scheduler.waiting
        sequence.token_ids[:] = prompt
        sequence.num_prompt_tokens = context
        while sequence.num_pending_tokens > 1:
            engine.scheduler.max_num_batched_tokens = min(2048, sequence.num_pending_tokens - 1)
            engine.scheduler.advance(engine.scheduler.schedule())
        assert sequence.cache is not None
        blocks = torch.tensor(sequence.cache.tables[0].blocks)
        if self._budget is not None:
            self._write_bounds(blocks)
        steps: list[tuple[float, float, float]] = []
        # The first generated token comes from the prompt, which reads all.
        engine.step()
        with Probe().watching() as probe:
            while engine.has_work:
                before = time.perf_counter(), time.process_time(), probe.attention_s
                engine.step()
                after = time.perf_counter(), time.process_time(), probe.attention_s
                steps.append((after[0] - before[0], after[1] - before[1], after[2] - before[2]))
        for step_s, cpu_s, attention_s in steps[1:]:
            found.step_s.append(step_s)
            found.cpu_s.append(cpu_s)
            found.attention_s.append(attention_s)
        if self._budget is not None:
            unchosen = set(blocks.tolist()) - probe.blocks
            found.unchosen.append(len(unchosen) / len(blocks))

    def _write_bounds(self, blocks: torch.Tensor) -> None:
        views = view_pages(self._engine.arena.layout, self._engine.arena.memory, 0)
        assert views.bounds is not None
        for first in range(0, len(blocks), SPAN_BLOCKS):
            span = blocks[first : first + SPAN_BLOCKS]
            least, greatest = views.keys[span].aminmax(dim=2)
            views.bounds[span, :, 0], views.bounds[span, :, 1] = least, greatest
            views.bounds[span, :, 2] = least.cummin(0).values
            views.bounds[span, :, 3] = greatest.cummax(0).values

    def close(self) -> None:
        """Give the memory back."""
        self._engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[4096, 16384, 65536], help="tokens"
    )
    parser.add_argument("--budget", type=int, default=1024, help="tokens (default 1024)")
    parser.add_argument("--tokens", type=int, default=32, help="decoded a round (default 32)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side (default 2)")
    parser.add_argument("--block-size", type=int, default=16, help="tokens a page (default 16)")
    parser.add_argument("--plot", type=Path, help="where a picture of the curve goes")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).save_pretrained(folder)
        words = {f"w{index}": index for index in range(CONFIG.vocab_size)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
        sides = {
            "budget": Side(folder, options.budget, options),
            "dense": Side(folder, None, options),
        }
        found = {(name, context): Measured() for name in sides for context in options.contexts}
        for _ in range(options.rounds):
            for context in options.contexts:
                for name, side in sides.items():
                    side.measure(context, options.tokens, found[name, context])
        for side in sides.values():
            side.close()
    report(found, options)
    if options.plot is not None:
        draw(found, options)


def report(found: dict[tuple[str, int], Measured], options: argparse.Namespace) -> None:
    step = {each: statistics.median(sides.step_s) * 1e3 for each, sides in found.items()}
    cpu = {each: statistics.median(sides.cpu_s) * 1e3 for each, sides in found.items()}
    attention = {each: statistics.median(sides.attention_s) * 1e3 for each, sides in found.items()}
    print(f"\ndecode of one sequence, budget {options.budget} tokens, float32, median ms a token")
    print(f"{'':>8}{'with a budget':>27}{'dense':>27}{'':>9}{'blocks that':>14}")
    columns = f"{'step':>9}{'its CPU':>9}{'attend':>9}"
    print(f"{'context':>8}{columns}{columns}{'speed':>9}{'no head chose':>14}")
    unchosen: dict[int, float] = {}
    for context in options.contexts:
        unchosen[context] = statistics.mean(found["budget", context].unchosen)
        cells = "".join(
            f"{times[name, context]:>9.2f}"
            for name in ("budget", "dense")
            for times in (step, cpu, attention)
        )
        speed = step["dense", context] / step["budget", context]
        print(f"{context:>8}{cells}{speed:>8.1f}x{unchosen[context]:>14.1%}")

    def spread(times: dict[tuple[str, int], float]) -> float:
        of_budget = [times["budget", context] for context in options.contexts]
        return round(max(of_budget) / min(of_budget), 3)

    print(f"slowest over fastest context with a budget: {spread(step)}, of CPU time {spread(cpu)}")

    def by_context(values: dict[tuple[str, int], float]) -> dict[str, dict[int, float]]:
        return {
            name: {context: round(values[name, context], 3) for context in options.contexts}
            for name in ("budget", "dense")
        }

    print(
        json.dumps(
            {
                "benchmark": "selection_cpu",
                "budget_tokens": options.budget,
                "block_size": options.block_size,
                "step_ms": by_context(step),
                "step_cpu_ms": by_context(cpu),
                "attention_ms": by_context(attention),
                "speed_over_dense": {
                    context: round(step["dense", context] / step["budget", context], 2)
                    for context in options.contexts
                },
                "slowest_over_fastest": spread(step),
                "slowest_over_fastest_cpu": spread(cpu),
                "blocks_never_chosen": {
                    context: round(share, 4) for context, share in unchosen.items()
                },
                "steps": options.tokens,
                "threads": torch.get_num_threads(),
                "cpu": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "torch": torch.__version__,
            }
        )
    )


def draw(found: dict[tuple[str, int], Measured], options: argparse.Namespace) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    names = {"dense": "every page", "budget": f"a budget of {options.budget} tokens"}
    for (side, name), marker in zip(names.items(), "os", strict=True):
        times = [1e3 * statistics.median(found[side, each].step_s) for each in options.contexts]
        axes.plot(options.contexts, times, marker=marker, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(options.contexts, [f"{each:,}" for each in options.contexts])
    axes.set(xlabel="tokens of context", ylabel="ms a token", title="Decode of one sequence, CPU")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(options.plot, dpi=150)


if __name__ == "__main__":
    main()
