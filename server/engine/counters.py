"""Counts what the engine does."""

import time
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from dataclasses import dataclass, field

from headlong.cache.capacity import MemoryPlan
from headlong.cache.prefix_match import MISS_REASONS
from headlong.server.engine.scheduler import ScheduledChunk, Scheduler
from headlong.server.engine.sequence import Sequence
from headlong.server.engine.status import CanaryStats, EngineStats


@dataclass(slots=True)
class Counters:
    """Sums since the start, and the last step. `EngineStats` says what each is."""

    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_hits: int = 0
    # With all reasons from the start: of a series that begins at 1, nobody sees the first one.
    prefix_misses: Counter[str] = field(
        default_factory=lambda: Counter(dict.fromkeys(MISS_REASONS, 0))
    )
    step_prefill_tokens: int = 0
    step_decode_tokens: int = 0
    step_s: float = 0.0
    step_s_total: float = 0.0
    model_s_total: float = 0.0

    def note_started(self, sequence: Sequence) -> None:
        """Count a prompt that left the queue for the first time."""
        self.prompt_tokens += sequence.num_prompt_tokens
        self.prefix_hits += sequence.num_cached_tokens
        self.prefix_misses.update(sequence.cache_misses)

    def note_chunks(self, chunks: Many[ScheduledChunk]) -> None:
        """Count a step's tokens, before they are computed."""
        self.steps += 1
        self.step_decode_tokens = sum(chunk.sequence.decoding for chunk in chunks)
        total = sum(chunk.num_tokens for chunk in chunks)
        self.step_prefill_tokens = total - self.step_decode_tokens

    def note_time(self, seconds: float) -> None:
        """Add the time of a step."""
        self.step_s = seconds
        self.step_s_total += seconds

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Add the time of what runs inside to the model's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.model_s_total += time.perf_counter() - start

    def stats(
        self, scheduler: Scheduler, plan: MemoryPlan, canary: CanaryStats, num_preparing: int
    ) -> EngineStats:
        """The engine's state now.

        Args:
            scheduler: Who runs and who waits.
            plan: What a full cache would take.
            canary: Its figures.
            num_preparing: Completions that the scheduler does not know yet.
        """
        cache = scheduler.cache
        lengths = [each.cache.num_tokens for each in scheduler.running if each.cache is not None]
        parked = sum(each.num_slots - 1 for each in (*scheduler.running, *scheduler.waiting))
        return EngineStats(
            steps_total=self.steps,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + parked + num_preparing,
            owned_blocks=cache.owned_blocks,
            cached_blocks=cache.cached_blocks,
            free_blocks=cache.free_blocks,
            kv_bytes_owned=cache.owned_bytes,
            kv_bytes_full=sum(map(plan.full_sequence_bytes, lengths)),
            prompt_tokens_total=self.prompt_tokens,
            generation_tokens_total=self.generation_tokens,
            preemptions_total=scheduler.num_preemptions,
            prefix_queries_total=self.prefix_hits + self.prefix_misses.total(),
            prefix_hits_total=self.prefix_hits,
            prefix_misses_total=dict(self.prefix_misses),
            step_prefill_tokens=self.step_prefill_tokens,
            step_decode_tokens=self.step_decode_tokens,
            step_s=self.step_s,
            step_s_total=self.step_s_total,
            model_s_total=self.model_s_total,
            canary=canary,
            tiers=scheduler.prefixes.stats(),
        )
