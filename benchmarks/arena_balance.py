"""What sharing an arena in slabs is worth: cache and scheduler over traces, without a model.

    python benchmarks/arena_balance.py

The bookkeeping is the server's own (`KVCache`, `Scheduler`), for the KV heads of a model of the
shape of Llama-3-8B, so every admission, preemption, prefix hit and moved block is what a server
would do. Only the time is made up: a step takes what `StepCost` says for its tokens and for the
bytes of cache that it reads. All sides serve the same requests, from the times in the trace on:

    slabs         head groups share the arena
    fixed         each has its share, sized for the profile's policy
    fixed, wide   the same, with tokens set aside for requests that keep everything

The synthetic traces have many chats, long documents and a share of requests that ask for the full
cache, in one mix, in phases that follow each other, or without full ones. The recorded trace is the
repository's own bench: the requests of `headlong bench --workload chat` against the embedded model.
"Stranded" is memory that no running request has or may come to need, while one waits that would fit
into it: of the next eight that wait, and if another may run at all.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headlong.cache.block_copy import BlockCopy
from headlong.cache.cache_shape import CacheShape
from headlong.cache.capacity import plan_memory
from headlong.cache.groups import build_head_groups
from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.cache.reservation import Reservation, most_owned
from headlong.demo.paths import MODEL_DIR
from headlong.loadtest.trace_lines import read_trace
from headlong.profiling.head_profile import num_streaming_heads
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams
from headlong.server.engine.scheduler import ScheduledChunk, Scheduler
from headlong.server.engine.sequence import Sequence as Running
from headlong.server.engine.sequence import SequencePlan

RECORDED = Path(__file__).parent / "traces" / "chats.jsonl"
NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
STREAMING = HeadPolicy(sink_size=128, window_size=256)
BLOCK_SIZE = 16
LOOKED_AT = 8
"""Waiting requests of which one that would fit shows that memory is stranded."""
TRACE_BLOCK = 512
"""Tokens that a hash id of the recorded trace stands for."""


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step: an 8 B model in bfloat16 on a GPU of 3 TB/s, about."""

    base: float = 6e-3
    token: float = 2e-5
    byte: float = 1 / 3e12

    def seconds(self, num_tokens: int, num_bytes: int) -> float:
        return self.base + self.token * num_tokens + self.byte * num_bytes


@dataclass(frozen=True)
class Asked:
    """A request of a trace."""

    arrived: float
    prompt: tuple[int, ...]
    num_completion: int
    wide: bool


@dataclass
class Outcome:
    """What one side made of a trace."""

    completed: int = 0
    refused: int = 0
    preemptions: int = 0
    moved_blocks: int = 0
    seconds: float = 0.0
    used_byte_seconds: float = 0.0
    stranded_byte_seconds: float = 0.0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    waits: list[float] = field(default_factory=list)
    bookkeeping_s: float = 0.0
    steps: int = 0

    def figures(self, arena_bytes: int) -> dict[str, float]:
        waits = sorted(self.waits)
        return {
            "completed": self.completed,
            "refused": self.refused,
            "requests_per_s": round(self.completed / self.seconds, 3),
            "utilisation": round(self.used_byte_seconds / self.seconds / arena_bytes, 4),
            "stranded": round(self.stranded_byte_seconds / self.seconds / arena_bytes, 4),
            "hit_rate": round(self.hit_tokens / max(1, self.prompt_tokens), 4),
            "wait_p90_s": round(waits[len(waits) * 9 // 10], 2) if waits else 0.0,
            "preemptions": self.preemptions,
            "moved_blocks": self.moved_blocks,
            "bookkeeping_us_per_step": round(self.bookkeeping_s / max(1, self.steps) * 1e6, 1),
        }


def words(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.choices(range(100), k=count))


def chat(rng: random.Random, start: float, wide: bool) -> Iterator[Asked]:
    """A few turns, each prompt the conversation so far; an answer is unlike any prompt."""
    history = words(rng, rng.randint(100, 600))
    for _ in range(rng.randint(1, 5)):
        answer = rng.randint(100, 600)
        yield Asked(start, history, answer, wide)
        start += rng.uniform(5, 30)
        history += words(rng, answer + rng.randint(20, 200))


def document(rng: random.Random, start: float, wide: bool, longest: int) -> Iterator[Asked]:
    """A long text and some questions about it."""
    text = words(rng, int(longest * rng.uniform(0.3, 1.0)))
    for _ in range(rng.randint(1, 3)):
        yield Asked(start, text + words(rng, 40), rng.randint(100, 500), wide)
        start += rng.uniform(3, 20)


def synthetic(name: str, num_sessions: int, seed: int) -> list[Asked]:
    """Sessions by kind: chats, documents, and how many of either want the full cache."""
    rng = random.Random(f"{name} {seed}")
    asked: list[Asked] = []
    for index in range(num_sessions):
        start = index * 0.03
        part = index / num_sessions
        # Share of documents, and of sessions that want everything.
        documents, wide = {
            "compressed": (0.25, 0.0),
            "mixed": (0.25, 0.25),
            "phases": ((0.02, 0.0), (0.8, 0.0), (0.1, 0.9), (0.5, 0.3))[int(part * 4)],
        }[name]
        is_wide = rng.random() < wide
        if rng.random() < documents:
            asked += document(rng, start, is_wide, 12_000 if is_wide else 32_000)
        else:
            asked += chat(rng, start, is_wide)
    return sorted(asked, key=lambda each: each.arrived)


def recorded(path: Path, wide: float, copies: int, seed: int) -> list[Asked]:
    """The requests of a trace file, some of them with the full cache; more sessions, more load."""
    rng = random.Random(seed)
    wide_sessions: dict[tuple[int, int | str], bool] = {}
    asked: list[Asked] = []
    for copy in range(copies):
        for each in read_trace(path, TRACE_BLOCK):
            prompt: list[int] = []
            for block in each.hash_ids:
                prompt += words(random.Random(f"{seed} {copy} {block}"), TRACE_BLOCK)
            first = (copy, each.hash_ids[0])
            if first not in wide_sessions:
                wide_sessions[first] = rng.random() < wide
            asked.append(
                Asked(
                    each.timestamp / 1000,
                    tuple(prompt[: each.input_length]),
                    each.output_length or 1,
                    wide_sessions[first],
                )
            )
    return sorted(asked, key=lambda each: each.arrived)


class Side:
    """One way of sharing the arena, and a clock."""

    def __init__(
        self, shape: CacheShape, memory: int, tokenizer: PreTrainedTokenizerBase, cost: StepCost
    ) -> None:
        self.plan, layout = plan_memory(shape, memory, 65_536)
        # There is no memory, so there is nothing to copy: the blocks are counted.
        self._moved: list[BlockCopy] = []
        self._cache = KVCache(
            shape.groups,
            layout,
            copy_blocks=self._moved.extend,
            wide_tokens=self.plan.shape.wide_tokens,
        )
        self._tokenizer = tokenizer
        self._cost = cost
        self._scheduler = Scheduler(
            self._cache,
            EngineConfig(
                model="none",
                block_size=shape.block_size,
                max_num_seqs=shape.max_num_seqs,
                max_num_batched_tokens=shape.max_num_batched_tokens,
            ),
        )
        self._answers = random.Random(0)

    def serve(self, trace: Sequence[Asked]) -> Outcome:
        outcome = Outcome()
        waiting = list(reversed(trace))
        arrived: dict[Running, float] = {}
        now = 0.0
        while waiting or self._scheduler.has_work:
            if not self._scheduler.has_work:
                now = max(now, waiting[-1].arrived)
            while waiting and waiting[-1].arrived <= now:
                asked = waiting.pop()
                sequence = self._admit(asked, outcome)
                if sequence is not None:
                    arrived[sequence] = asked.arrived
            begin = time.perf_counter()
            chunks = self._scheduler.schedule()
            outcome.bookkeeping_s += time.perf_counter() - begin
            if not chunks:
                continue
            seconds = self._cost.seconds(
                sum(chunk.num_tokens for chunk in chunks), self._cache.owned_bytes
            )
            self._observe(outcome, seconds)
            for started in self._scheduler.take_started():
                outcome.waits.append(now - arrived[started])
                outcome.prompt_tokens += started.num_prompt_tokens
                outcome.hit_tokens += started.num_cached_tokens
            now += seconds
            begin = time.perf_counter()
            self._finish(chunks, outcome)
            outcome.bookkeeping_s += time.perf_counter() - begin
            outcome.steps += 1
        outcome.seconds = now
        outcome.preemptions = self._scheduler.num_preemptions
        outcome.moved_blocks = len(self._moved)
        self._cache.check_integrity()
        return outcome

    def _admit(self, asked: Asked, outcome: Outcome) -> Running | None:
        policies = self._cache.policies(RETRIEVAL if asked.wide else None)
        length = len(asked.prompt) + asked.num_completion
        if not self._cache.fits(length, policies):
            outcome.refused += 1
            return None
        params = SamplingParams(max_tokens=asked.num_completion, ignore_eos=True)
        request = EngineRequest("r", asked.prompt, params)
        plan = SequencePlan(policies, self._cache.keys(policies), length)
        sequence = Running(request, 0, plan, self._tokenizer, seed=0, device=torch.device("cpu"))
        self._scheduler.add(sequence)
        return sequence

    def _observe(self, outcome: Outcome, seconds: float) -> None:
        outcome.used_byte_seconds += self._cache.owned_bytes * seconds
        running = [each.reservation() for each in self._scheduler.running]
        free_slots = self.plan.shape.max_num_seqs - len(running)
        waiting = list(islice(self._scheduler.waiting, LOOKED_AT))
        if free_slots <= 0 or not waiting:
            return
        # What those that run may come to need is not free, whoever owns it now.
        free = self.plan.arena_bytes - self._bytes_for(running)
        if any(self._bytes_for([each.reservation()], alone=True) <= free for each in waiting):
            outcome.stranded_byte_seconds += free * seconds

    def _bytes_for(self, reservations: Sequence[Reservation], *, alone: bool = False) -> int:
        """Bytes that sequences may come to need; without what others hold if alone."""
        total = 0
        for group, pool in enumerate(self._cache.pools):
            if alone:
                blocks = sum(
                    each.policies[group].step_blocks(each.num_tokens, BLOCK_SIZE)
                    for each in reservations
                )
            else:
                live = [each.cache for each in reservations if each.cache is not None]
                blocks = most_owned(group, pool, BLOCK_SIZE, reservations, live)
            total += blocks * self._cache.layout.block_bytes(group)
        return total

    def _finish(self, chunks: Sequence[ScheduledChunk], outcome: Outcome) -> None:
        done = [chunk.sequence for chunk in chunks if chunk.completes]
        self._scheduler.advance(list(chunks))
        for sequence in done:
            sequence.token_ids.append(self._answers.randrange(100, 200))
            if sequence.num_output_tokens >= sequence.params.max_tokens:
                self._scheduler.remove(sequence)
                outcome.completed += 1


def cache_shape(sparsity: float, max_num_seqs: int) -> CacheShape:
    streaming = num_streaming_heads(NUM_LAYERS * NUM_KV_HEADS, sparsity)
    labels = [
        [layer * NUM_KV_HEADS + head >= streaming for head in range(NUM_KV_HEADS)]
        for layer in range(NUM_LAYERS)
    ]
    return CacheShape(
        groups=build_head_groups(labels, STREAMING, [None] * NUM_LAYERS),
        head_dim=HEAD_DIM,
        dtype=torch.bfloat16,
        block_size=BLOCK_SIZE,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=2048,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=6.0, help="the arena (default 6)")
    parser.add_argument("--sparsity", type=float, default=0.6, help="streaming heads (default 0.6)")
    parser.add_argument("--sessions", type=int, default=110, help="of a synthetic trace")
    parser.add_argument("--copies", type=int, default=4, help="of the recorded trace, at once")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--wide-tokens", type=int, default=12_288, help="set aside by fixed, wide")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    shape = cache_shape(options.sparsity, options.max_num_seqs)
    sides = {
        "slabs": replace(shape, in_slabs=True),
        "fixed": shape,
        "fixed, wide": replace(shape, wide_tokens=options.wide_tokens),
    }
    traces = {
        name: synthetic(name, options.sessions, options.seed)
        for name in ("compressed", "mixed", "phases")
    }
    traces["recorded"] = recorded(RECORDED, 0.25, options.copies, options.seed)
    memory = int(options.gib * 2**30)
    results: dict[str, dict[str, dict[str, float]]] = {}
    columns = ("completed", "refused", "requests_per_s", "utilisation", "stranded", "hit_rate",
               "wait_p90_s", "preemptions", "moved_blocks")  # fmt: skip
    print(f"{options.gib:g} GiB, {options.sparsity:.0%} of the KV heads stream")
    print(f"{'trace':<11} {'arena':<12} " + " ".join(f"{name:>14}" for name in columns))
    for name, trace in traces.items():
        results[name] = {}
        for side, shaped in sides.items():
            built = Side(shaped, memory, tokenizer, StepCost())
            figures = built.serve(trace).figures(built.plan.arena_bytes)
            results[name][side] = figures
            row = " ".join(f"{figures[column]:>14g}" for column in columns)
            print(f"{name:<11} {side:<12} {row}", flush=True)
    print(
        json.dumps(
            {
                "benchmark": "arena_balance",
                "arena_bytes": memory,
                "sparsity": options.sparsity,
                "sessions": options.sessions,
                "seed": options.seed,
                "traces": results,
            }
        )
    )


if __name__ == "__main__":
    main()
