"""Where a sequence's prefix comes from: the arena, the host, the disk, or computing it.

What the arena has is shared at once. What the host has is loaded, if by what was measured that is
quicker than to compute it:

    (bytes to load + bytes on their way) / bytes a second  <=  tokens / prompt tokens a second

where a token that is computed alone, under a retrieval budget, takes a whole step.
What only the disk has is read into the host while the sequence waits, by the same rule with both
ways added. A sequence that lost its blocks comes back like any other.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import get_args

from headlong.cache.block_pool import OutOfBlocksError
from headlong.cache.block_tiers import Fetch
from headlong.cache.kv_cache import KVCache
from headlong.cache.moving_rate import MovingRate
from headlong.cache.prefix_match import PrefixMatch
from headlong.cache.sequence_cache import SequenceCache
from headlong.cache.tiered_cache import TieredCache
from headlong.server.engine.sequence import Sequence
from headlong.server.engine.status import Resume, TierStats

AHEAD = 8
"""Waiting sequences whose blocks are read from disk before it is their turn."""

MAX_FETCH_S = 10.0
"""A sequence waits no longer for the disk."""


@dataclass(frozen=True, slots=True)
class PrefixChoice:
    """What a sequence begins with.

    Attributes:
        match: What it shares; None if it has to compute everything.
        num_loaded_tokens: Tokens of that which the arena does not have.
        num_recomputed_tokens: Tokens that the host has, and that are computed anew all the same.
    """

    match: PrefixMatch | None
    num_loaded_tokens: int = 0
    num_recomputed_tokens: int = 0


class PrefixSource:
    """Finds prefixes, and decides what is worth loading.

    Args:
        cache: Owner of all blocks.

    Attributes:
        prefill_rate: Prompt tokens that are computed in a second.
        step_rate: Steps of decodes that are computed in a second.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._tiered = cache if isinstance(cache, TieredCache) else None
        self.prefill_rate = MovingRate()
        self.step_rate = MovingRate()
        # Of sequences that wait, what is read for them; None if that was looked into already.
        self._fetches: dict[Sequence, Fetch | None] = {}
        self._preempted: set[Sequence] = set()
        self._num_loaded_tokens = 0
        self._num_recomputed_tokens = 0
        self._resumes: Counter[str] = Counter(dict.fromkeys(get_args(Resume), 0))

    @property
    def loads(self) -> bool:
        """Whether blocks are on their way to the arena."""
        return self._tiered is not None and self._tiered.loads

    def settle(self) -> bool:
        """Take note of what arrived; whether it can change who is admitted."""
        if self._tiered is None:
            return False
        arrived = self._tiered.settle()
        late = time.perf_counter() - MAX_FETCH_S
        for sequence, fetch in self._fetches.items():
            if fetch is not None and fetch.num_pending and fetch.began < late:
                self._fetches[sequence] = None
                arrived = True
        return arrived

    def copy_ahead(self) -> bool:
        """Let an idle engine copy blocks to the host; whether there is more to do."""
        return self._tiered is not None and self._tiered.copy_ahead()

    def wait(self) -> None:
        """Wait a little for what is on its way, if anything is."""
        if self._tiered is not None:
            self._tiered.wait()

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether a running sequence can be computed: its blocks have their contents."""
        if self._tiered is None:
            return True
        assert sequence.cache is not None
        return self._tiered.is_ready(sequence.cache)

    def look_ahead(self, waiting: Iterable[Sequence]) -> None:
        """Begin to read from disk what the next sequences can begin with.

        Args:
            waiting: Those that wait, about in the order in which it is their turn.
        """
        for sequence in islice(waiting, AHEAD):
            self.awaits_disk(sequence)

    def awaits_disk(self, sequence: Sequence) -> bool:
        """Begin to read from disk what a sequence can begin with.

        Args:
            sequence: It waits.

        Returns:
            Whether it has to wait for that.
        """
        # Once each: what is read and pushed out again must not be read for ever.
        if self._tiered is not None and sequence not in self._fetches:
            self._fetches[sequence] = self._fetch(self._tiered, sequence)
        fetch = self._fetches.get(sequence)
        return fetch is not None and fetch.num_pending > 0

    def _fetch(self, cache: TieredCache, sequence: Sequence) -> Fetch | None:
        if not sequence.may_share_prefix:
            return None
        num_tokens = len(sequence.token_ids)
        plan = cache.plan_fetch(sequence.keys, num_tokens)
        tiers = cache.tiers
        if plan is None or tiers is None:
            return None
        held = cache.match(sequence.keys, num_tokens).num_tokens
        seconds = tiers.read_seconds(plan.num_bytes) + tiers.load_seconds(plan.num_bytes)
        if seconds > self._compute_seconds(sequence, held, plan.num_tokens):
            return None
        return cache.fetch(plan)

    def choose(self, sequence: Sequence) -> PrefixChoice:
        """Decide what a sequence begins with."""
        if not sequence.may_share_prefix:
            return PrefixChoice(None)
        num_tokens = len(sequence.token_ids)
        match = self._cache.match(sequence.keys, num_tokens)
        cache = self._tiered
        if cache is None or cache.tiers is None:
            return PrefixChoice(match)
        num_bytes = cache.load_bytes(match)
        if num_bytes == 0:
            return PrefixChoice(match)
        in_arena = cache.match_arena(sequence.keys, num_tokens)
        gained = match.num_tokens - in_arena.num_tokens
        computing_s = self._compute_seconds(sequence, in_arena.num_tokens, match.num_tokens)
        if cache.tiers.load_seconds(num_bytes) <= computing_s:
            return PrefixChoice(match, num_loaded_tokens=gained)
        return PrefixChoice(in_arena, num_recomputed_tokens=gained)

    def _compute_seconds(self, sequence: Sequence, first: int, last: int) -> float:
        """How long it takes to compute a sequence's tokens from `first` to before `last`."""
        num_alone = sequence.num_alone(first, last)
        seconds = 0.0
        for count, rate in (
            (last - first - num_alone, self.prefill_rate),
            (num_alone, self.step_rate),
        ):
            if count:
                # What was never measured might take for ever.
                seconds += count / rate.per_second if rate.per_second else math.inf
        return seconds

    def begin(
        self, sequence: Sequence, choice: PrefixChoice
    ) -> tuple[SequenceCache, PrefixMatch | None]:
        """Begin with what was chosen.

        Returns:
            The tables, and what they share.
        """
        self._fetches.pop(sequence, None)
        try:
            cache = self._cache.begin(sequence.policies, choice.match)
        except OutOfBlocksError:
            # Copies for one that has gone still hold blocks: begin with what takes none.
            assert self._tiered is not None, "only what is loaded takes blocks"
            in_arena = self._tiered.match_arena(sequence.keys, len(sequence.token_ids))
            choice = PrefixChoice(in_arena, num_recomputed_tokens=choice.num_loaded_tokens)
            cache = self._cache.begin(sequence.policies, in_arena)
        self._num_loaded_tokens += choice.num_loaded_tokens
        self._num_recomputed_tokens += choice.num_recomputed_tokens
        if sequence in self._preempted:
            self._preempted.remove(sequence)
            resume: Resume = "swapped_in" if choice.num_loaded_tokens else "recomputed"
            self._resumes[resume] += 1
        return cache, choice.match

    def forget_rates(self) -> None:
        """Measure anew: what came before was a warm-up."""
        self.prefill_rate = MovingRate()
        self.step_rate = MovingRate()

    def note_preempted(self, sequence: Sequence) -> None:
        """Learn that a sequence lost its blocks."""
        self._preempted.add(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence that ended."""
        self._fetches.pop(sequence, None)
        self._preempted.discard(sequence)

    def note_step(self, num_prompt_tokens: int, num_decodes: int, seconds: float) -> None:
        """Measure computing.

        Args:
            num_prompt_tokens: Prompt tokens of a step.
            num_decodes: Its decodes.
            seconds: What it took.
        """
        # Where decodes are most of a step, or it is tiny, its time says little of a prompt's.
        if num_prompt_tokens >= max(self._cache.block_size, num_decodes):
            self.prefill_rate.add(num_prompt_tokens + num_decodes, seconds)
        elif num_prompt_tokens == 0:
            self.step_rate.add(1, seconds)

    def stats(self) -> TierStats:
        """The tiers' figures."""
        tiers = None if self._tiered is None else self._tiered.tiers
        stats = TierStats(
            loaded_tokens=self._num_loaded_tokens,
            recomputed_tokens=self._num_recomputed_tokens,
            resumes=dict(self._resumes),
        )
        if tiers is None:
            return stats
        # With every name from the start: of a series that begins at 1, nobody sees the first one.
        return replace(
            stats,
            host_bytes=tiers.host.held_bytes,
            disk_bytes=0 if tiers.disk is None else tiers.disk.held_bytes,
            moved_bytes={**stats.moved_bytes, **tiers.figures.num_bytes},
            moved_seconds={**stats.moved_seconds, **tiers.figures.seconds},
            lost_blocks={**stats.lost_blocks, **tiers.figures.losses},
        )
