"""Which sequences run in a step, and how many tokens of each.

    waiting   in a fair order; owns no blocks
    running   in order of admission; owns blocks
    parked    waits for a running sequence to compute the prompt that both have; owns no blocks
    finished  owns no blocks, and is known to nobody here

A step gives one token to every sequence that decodes, admits waiting ones, and shares the rest of
its tokens among the prompts in progress. While others decode that rest is small, so that none waits
long for its next token. Short prompts come first, but the oldest one always gets its part.

A sequence is admitted if what it may come to need, prompt and completion, fits beside what the
running ones may. If a decode finds no block all the same, the youngest sequence loses its own, or
one of the same tenant that matters less, and is computed anew.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from headlong.cache.block_pool import OutOfBlocksError
from headlong.cache.kv_cache import KVCache
from headlong.cache.prefix_match import PrefixMatch
from headlong.cache.sequence_cache import SequenceCache
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.prefix_source import PrefixChoice, PrefixSource
from headlong.server.engine.sequence import Sequence
from headlong.server.engine.waiting import WaitingQueue

MAX_TRIES = 8
"""Waiting sequences that a step looks at beyond those that it admits."""

MAX_FETCHING = 64
"""Waiting sequences that a step leaves aside because the disk is read for them."""

MAX_PASSED = 64
"""Sequences that may be admitted past one for which there is no room."""

OLDEST_SHARE = 4
"""The oldest prompt gets this part of the prompt tokens of a step before shorter ones."""

SCORED_TOKENS = 256
"""Most tokens of a step of prompts whose logits are all wanted: each takes a row of them."""


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """The next `num_tokens` tokens of a sequence; its tables hold blocks for them."""

    sequence: Sequence
    cache: SequenceCache
    num_tokens: int

    @property
    def completes(self) -> bool:
        """Whether the step computes all that the sequence has, so that it gets a token."""
        return self.num_tokens == self.sequence.num_pending_tokens


class Scheduler:
    """Continuous batching with chunked prefill over a `KVCache`.

    Args:
        cache: Owner of all blocks.
        config: Bounds of a step.

    Attributes:
        waiting: Sequences that own no blocks.
        running: Sequences that own blocks, the oldest first.
        num_preemptions: Times that blocks were taken from a running sequence.
        prefixes: Where sequences begin.
    """

    def __init__(self, cache: KVCache, config: EngineConfig) -> None:
        self.cache = cache
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.chunked_prefill_size = config.chunked_prefill_size or max(
            1, config.max_num_batched_tokens // 4
        )
        self.num_preemptions = 0
        self.prefixes = PrefixSource(cache)
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self._started: list[Sequence] = []
        # Whether a sequence came or went since the last look at those that wait.
        self._changed = True

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, which must fit the cache when it is alone."""
        self.waiting.add(sequence)
        self._changed = True

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and free its blocks."""
        self._changed = True
        self.prefixes.drop(sequence)
        if sequence.cache is not None:
            self.running.remove(sequence)
            self.waiting.leave(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[ScheduledChunk]:
        """Choose the step's work and allocate its blocks.

        Empty only if there is no work, or if all that could be done waits for blocks.
        """
        if self.prefixes.settle():
            self._changed = True
        while True:
            chunks = self._decodes()
            self._admit()
            chunks += self._prefills(chunks)
            if chunks or not self.running or self.prefixes.loads:
                return chunks
            # Prompts in progress hold all blocks between them and none can go on.
            self._preempt(self._victim([]))

    def advance(self, chunks: list[ScheduledChunk]) -> None:
        """After the step: its tokens are cached and can be found, and windows move on."""
        now = time.monotonic()
        for chunk in chunks:
            sequence = chunk.sequence
            decoded = sequence.decoding
            if not decoded:
                sequence.note_prefill(now, chunk.num_tokens)
            sequence.num_computed_tokens += chunk.num_tokens
            self.cache.publish(chunk.cache, sequence.keys)
            self.cache.release_expired(chunk.cache)
            self.waiting.charge(
                sequence.request.tenant, 0 if decoded else chunk.num_tokens, int(decoded)
            )

    def take_started(self) -> list[Sequence]:
        """Hand out the sequences that ran for the first time since the last call."""
        started, self._started = self._started, []
        return started

    def fork(self, sequence: Sequence) -> list[Sequence]:
        """Let the sequences parked with one whose prompt is computed run beside it.

        Returns:
            The sequences that share the prompt now. One for whose own blocks there is no room
            computes it anew, later.
        """
        assert sequence.cache is not None
        forked: list[Sequence] = []
        for other in sequence.take_parked():
            other.follow(sequence)
            try:
                other.cache = self.cache.fork(sequence.cache)
            except OutOfBlocksError:
                self.waiting.enter(other)
                self.waiting.put_back(other)
                continue
            other.num_computed_tokens = sequence.num_computed_tokens
            other.num_shared_tokens = self.cache.full_tokens(sequence.num_computed_tokens)
            other.note_bytes(self.cache)
            self.waiting.enter(other)
            self.running.append(other)
            forked.append(other)
        return forked

    def _decodes(self) -> list[ScheduledChunk]:
        chunks: list[ScheduledChunk] = []
        for sequence in [each for each in self._ready() if each.decoding]:
            while sequence.cache is not None:
                if self._room(sequence, 1):
                    chunks.append(self._take(sequence, sequence.cache, 1))
                    break
                if self.prefixes.loads:
                    # Until what is loaded arrives, nobody's loss would free the blocks it goes to.
                    break
                self._preempt(self._victim(chunks))
        return chunks

    def _admit(self) -> None:
        if not self._changed:
            return
        self._changed = False
        self.prefixes.look_ahead(self.waiting)
        passed: list[Sequence] = []
        # That they wait for the disk makes nobody less important.
        fetching: list[Sequence] = []
        free_slots = self.max_num_seqs - sum(each.num_slots for each in self.running)
        while free_slots and len(passed) < MAX_TRIES and len(fetching) < MAX_FETCHING:
            sequence = self.waiting.next([*passed, *fetching])
            if sequence is None:
                return
            if self.prefixes.awaits_disk(sequence):
                fetching.append(sequence)
                continue
            choice = None
            if sequence.num_slots <= free_slots:
                choice = self.prefixes.choose(sequence)
                if not self._fits_beside_running(sequence, choice.match):
                    choice = None
            if choice is None:
                passed.append(sequence)
                if sequence.num_passed >= MAX_PASSED:
                    return
                continue
            for other in passed:
                other.num_passed += 1
            self.waiting.admit(sequence)
            self._begin(sequence, choice)
            free_slots -= sequence.num_slots

    def _fits_beside_running(self, sequence: Sequence, match: PrefixMatch | None) -> bool:
        if not self.running:
            return True
        wanted = sequence.reservation(match)
        return self.cache.has_room(wanted, (each.reservation() for each in self.running))

    def _begin(self, sequence: Sequence, choice: PrefixChoice) -> None:
        sequence.cache, match = self.prefixes.begin(sequence, choice)
        sequence.num_computed_tokens = sequence.cache.num_tokens
        self.running.append(sequence)
        if sequence.started is None:
            sequence.started = time.monotonic()
            self._started.append(sequence)
            if match is not None:
                sequence.num_cached_tokens = match.num_tokens
                sequence.cache_misses = dict(match.misses)

    def _prefills(self, decodes: list[ScheduledChunk]) -> list[ScheduledChunk]:
        served = {chunk.sequence for chunk in decodes}
        # One that was preempted and admitted again may lack its newest token alone.
        prompts = [each for each in self._ready() if each not in served]
        budget = self.max_num_batched_tokens - len(decodes)
        if decodes:
            budget = min(budget, self.chunked_prefill_size)
        chunks: list[ScheduledChunk] = []
        for sequence, count in _share(prompts, budget):
            cache = sequence.cache
            assert cache is not None
            room = self._room(sequence, count)
            if room > 0:
                chunks.append(self._take(sequence, cache, room))
        return chunks

    def _ready(self) -> list[Sequence]:
        """Running sequences whose blocks have their contents."""
        return [each for each in self.running if self.prefixes.is_ready(each)]

    def _room(self, sequence: Sequence, num_tokens: int) -> int:
        assert sequence.cache is not None
        return self.cache.max_extension(sequence.cache, num_tokens)

    def _take(self, sequence: Sequence, cache: SequenceCache, num_tokens: int) -> ScheduledChunk:
        self.cache.extend(cache, num_tokens)
        sequence.note_bytes(self.cache)
        return ScheduledChunk(sequence, cache, num_tokens)

    def _victim(self, chunks: list[ScheduledChunk]) -> Sequence:
        """Who loses its blocks: not one that has a chunk of this step already."""
        served = {chunk.sequence for chunk in chunks}
        others = [each for each in reversed(self.running) if each not in served]
        tenant = others[0].request.tenant
        # Priorities are compared within a tenant alone; of equals the first is the youngest.
        return max(
            (each for each in others if each.request.tenant == tenant),
            key=lambda each: each.request.priority,
        )

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.restart()
        self.prefixes.note_preempted(sequence)
        self.num_preemptions += 1
        self.waiting.put_back(sequence)
        self._changed = True

    def _release(self, sequence: Sequence) -> None:
        assert sequence.cache is not None
        self.cache.free(sequence.cache)
        sequence.cache = None


def _share(prompts: list[Sequence], budget: int) -> Iterator[tuple[Sequence, int]]:
    """Deal a step's prompt tokens: a part to the oldest prompt, the rest to the shortest first."""
    if not prompts:
        return
    scored_budget = SCORED_TOKENS
    wanted: dict[Sequence, int] = {}
    for sequence in prompts:
        wanted[sequence] = sequence.num_chunk_tokens
        if sequence.scores_prompt:
            wanted[sequence] = min(wanted[sequence], scored_budget)
            scored_budget -= wanted[sequence]
    oldest = prompts[0]
    dealt = min(wanted[oldest], -(-budget // OLDEST_SHARE))
    budget -= dealt
    # Sorting keeps the order of admission among equals.
    for sequence in sorted(prompts, key=wanted.__getitem__):
        already = dealt if sequence is oldest else 0
        count = min(wanted[sequence] - already, budget)
        budget -= count
        if already + count:
            yield sequence, already + count
