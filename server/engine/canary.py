"""What compression costs on real traffic: finished requests scored again over the full cache.

While the engine is idle, a share of the finished requests runs once more, as it was served and with
heads that keep and read everything, side by side. For every token of the completion the two
distributions are compared. What was decoded under a retrieval budget is decoded so again, token by
token. A request that comes waits for one chunk at most; then the work makes way, and starts over
later.

Both run over the same arena: what the format of its pages costs is in both, and shows in neither.
"""

import random
from collections import Counter, deque
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import torch

from headlong.cache.block_pool import OutOfBlocksError
from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.cache.reservation import Reservation
from headlong.server.engine.device import free_memory, is_out_of_memory
from headlong.server.engine.selection import SelectionRule
from headlong.server.engine.sequence import Sequence
from headlong.server.engine.status import CanarySkip, CanaryStats
from headlong.server.engine.token_scores import PagedForward

MAX_STARTS = 4
"""A request that had to make way so often is given up, so that it does not keep others waiting."""

MAX_PENDING = 16
"""Requests that may wait to be scored; a busy server chooses among all that finish meanwhile."""


@dataclass(frozen=True, slots=True)
class _Finished:
    token_ids: list[int]
    num_prompt_tokens: int
    policies: tuple[HeadPolicy, ...]


@dataclass(slots=True)
class _Sums:
    """Sums over one request's completion."""

    tokens: int = 0
    kl: float = 0.0
    agreed: int = 0


class Canary:
    """Scores finished requests in pieces.

    Args:
        forward: Computes over the cache.
        cache: Where the requests ran, and where they run again.
        rule: When generated tokens chose pages; None if they read everything.
        rate: Fraction of the finished requests to score.
        seed: Of the choice.
    """

    def __init__(
        self,
        forward: PagedForward,
        cache: KVCache,
        rule: SelectionRule | None,
        *,
        rate: float,
        seed: int,
    ) -> None:
        self._cache = cache
        self._full = cache.policies(RETRIEVAL)
        self._forward = forward
        self._rule = rule
        self._rate = rate
        self._random = random.Random(seed)
        self._pending: deque[_Finished] = deque()
        self._work: Generator[None, None, _Sums] | None = None
        self._num_starts = 0
        self._skipped: Counter[str] = Counter()
        self.stats = CanaryStats()

    def offer(self, sequence: Sequence) -> None:
        """Let chance decide whether a finished sequence is scored."""
        if self._rate == 0.0 or self._random.random() >= self._rate:
            return
        if sequence.policies == self._full and not self._chose_pages(sequence):
            self._skip("full_already")
        elif len(self._pending) >= MAX_PENDING:
            self._skip("busy")
        else:
            self._pending.append(
                _Finished(list(sequence.token_ids), sequence.num_prompt_tokens, sequence.policies)
            )

    def _chose_pages(self, sequence: Sequence) -> bool:
        # The last token of a completion is never computed.
        computed = len(sequence.token_ids) - 1
        return self._rule is not None and computed > self._rule.dense_tokens(
            sequence.num_prompt_tokens
        )

    def step(self) -> bool:
        """Run a piece.

        Returns:
            False if there is nothing to score.
        """
        if not self._pending:
            return False
        if self._work is None and not self._start():
            return True
        assert self._work is not None
        try:
            next(self._work)
        except StopIteration as done:
            self._note(done.value)
        except OutOfBlocksError:
            self._drop("no_room")
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            free_memory(self._forward.device)
            self._drop("out_of_memory")
        return True

    def forget(self) -> None:
        """Score none of the requests that wait for it."""
        self.make_way()
        self._pending.clear()

    def make_way(self) -> None:
        """Give all blocks back; the request in progress starts over at the next step."""
        if self._work is not None:
            self._work.close()
            self._work = None

    def _start(self) -> bool:
        """Begin with the first that waits, or drop it."""
        finished = self._pending[0]
        if self._num_starts == MAX_STARTS:
            self._drop("interrupted")
            return False
        length = len(finished.token_ids)
        served = Reservation(finished.policies, length)
        # Found out beforehand: what is tried evicts what others may still come back to.
        if not self._cache.has_room(served, [Reservation(self._full, length)]):
            self._drop("no_room")
            return False
        self._num_starts += 1
        self._work = self._score(finished)
        return True

    def _score(self, finished: _Finished) -> Generator[None, None, _Sums]:
        # The logits at a token are about the next one; the last token has none.
        tokens = finished.token_ids[:-1]
        first = finished.num_prompt_tokens - 1
        sums = _Sums()
        with ExitStack() as stack:
            served, full = (
                stack.enter_context(
                    closing(self._forward.logits(tokens, policies, first, num_prompt_tokens))
                )
                for policies, num_prompt_tokens in (
                    (finished.policies, finished.num_prompt_tokens),
                    (self._full, None),
                )
            )
            reference: torch.Tensor | None = None
            for own in served:
                # A request that comes waits for a chunk of one of them, not of both.
                yield
                # Where one decodes, the other's chunks are longer.
                while reference is None or len(reference) < len(own):
                    more = next(full)
                    reference = more if reference is None else torch.cat([reference, more])
                    yield
                _compare(own, reference[: len(own)], sums)
                reference = reference[len(own) :] if len(reference) > len(own) else None
        return sums

    def _note(self, sums: _Sums) -> None:
        self._pending.popleft()
        self._work = None
        self._num_starts = 0
        before = self.stats
        self.stats = replace(
            before,
            requests=before.requests + 1,
            tokens=before.tokens + sums.tokens,
            kl_sum=before.kl_sum + sums.kl,
            top1_agreed=before.top1_agreed + sums.agreed,
        )

    def _drop(self, reason: CanarySkip) -> None:
        self.make_way()
        self._pending.popleft()
        self._num_starts = 0
        self._skip(reason)

    def _skip(self, reason: CanarySkip) -> None:
        self._skipped[reason] += 1
        self.stats = replace(self.stats, skipped=dict(self._skipped))


def _compare(served: torch.Tensor, full: torch.Tensor, sums: _Sums) -> None:
    """Add sum_v p(v) (ln p(v) - ln q(v)) of each row, p from the full cache and q as served."""
    p, q = torch.log_softmax(full, dim=-1), torch.log_softmax(served, dim=-1)
    sums.tokens += len(served)
    sums.kl += float((p.exp() * (p - q)).sum())
    sums.agreed += int((served.argmax(dim=-1) == full.argmax(dim=-1)).sum())
