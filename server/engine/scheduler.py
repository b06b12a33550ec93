"""Which sequences run in a step, and how many tokens of each.

    waiting   in order of arrival; owns no blocks
    running   in order of admission; owns blocks
    finished  owns no blocks, and is known to nobody here

A step gives one token to every sequence that decodes, then what is left of its tokens to prompts in
progress, then admits waiting ones. A sequence that cannot get a block takes those of the youngest,
which goes back to the head of the queue and is computed anew.
"""

from collections import deque
from dataclasses import dataclass

from headlong.cache.kv_cache import KVCache, SequenceCache
from headlong.server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """The next `num_tokens` tokens of a sequence; its tables hold blocks for them."""

    sequence: Sequence
    cache: SequenceCache
    num_tokens: int


class Scheduler:
    """Continuous batching with chunked prefill over a `KVCache`.

    Args:
        cache: Owner of all blocks.
        max_num_seqs: Most sequences that run at once.
        max_num_batched_tokens: Most tokens of a step.

    Attributes:
        waiting: Sequences that own no blocks, the next one first.
        running: Sequences that own blocks, the oldest first.
        num_preemptions: Times that blocks were taken from a running sequence.
    """

    def __init__(self, cache: KVCache, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_preemptions = 0
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, which must fit the cache when it is alone."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and free its blocks."""
        if sequence.cache is not None:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[ScheduledChunk]:
        """Choose the step's work and allocate its blocks; empty only if there is no work."""
        while True:
            chunks = self._decodes()
            budget = self.max_num_batched_tokens - len(chunks)
            chunks += self._prefills(budget)
            if chunks or not self.running:
                return chunks
            # Prompts in progress hold all blocks between them and none can go on.
            self._preempt_youngest()

    def advance(self, chunks: list[ScheduledChunk]) -> None:
        """After the step: its tokens are cached, and windows move on."""
        for chunk in chunks:
            chunk.sequence.num_computed_tokens += chunk.num_tokens
            self.cache.release_expired(chunk.cache)

    def _decodes(self) -> list[ScheduledChunk]:
        chunks: list[ScheduledChunk] = []
        for sequence in [each for each in self.running if each.decoding]:
            # The youngest comes last here too, so it can lose its blocks only before its turn.
            while sequence.cache is not None and self._room(sequence, 1) == 0:
                self._preempt_youngest()
            if sequence.cache is not None:
                chunks.append(self._take(sequence, sequence.cache, 1))
        return chunks

    def _prefills(self, budget: int) -> list[ScheduledChunk]:
        chunks: list[ScheduledChunk] = []
        for sequence in self.running:
            if sequence.decoding or sequence.cache is None:
                continue
            count = self._room(sequence, min(sequence.num_pending_tokens, budget))
            if count > 0:
                chunks.append(self._take(sequence, sequence.cache, count))
                budget -= count
        while budget > 0 and self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            growing = [
                (other.cache, len(other.token_ids) + 1)
                for other in self.running
                if other.cache is not None
            ]
            if not self.cache.has_room(len(sequence.token_ids) + 1, growing):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.cache = self.cache.begin()
            count = self._room(sequence, min(sequence.num_pending_tokens, budget))
            if count == 0:
                break
            chunks.append(self._take(sequence, sequence.cache, count))
            budget -= count
        return chunks

    def _room(self, sequence: Sequence, num_tokens: int) -> int:
        assert sequence.cache is not None
        return self.cache.max_extension(sequence.cache, num_tokens)

    def _take(self, sequence: Sequence, cache: SequenceCache, num_tokens: int) -> ScheduledChunk:
        self.cache.extend(cache, num_tokens)
        return ScheduledChunk(sequence, cache, num_tokens)

    def _preempt_youngest(self) -> None:
        sequence = self.running.pop()
        self._release(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.cache is not None
        self.cache.free(sequence.cache)
        sequence.cache = None
