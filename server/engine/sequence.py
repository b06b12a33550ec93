"""One completion inside the engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import HeadPolicy
from headlong.cache.prefix_keys import PrefixKeys
from headlong.cache.prefix_match import PrefixMatch
from headlong.cache.reservation import Reservation
from headlong.cache.sequence_cache import SequenceCache
from headlong.server.engine.detokenizer import Detokenizer, StopStrings
from headlong.server.engine.outputs import FinishReason, PositionLogprobs, PrefillChunk
from headlong.server.engine.request import EngineRequest

if TYPE_CHECKING:
    from headlong.server.engine.structured import StructureMatcher

UNASKED_COMPLETION_TOKENS = 1024
"""Reserved for a completion whose length the client left open."""
MAX_PREFILL_CHUNKS = 64
"""Most chunks that are told apart."""


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """What the engine decided of a request's cache.

    Attributes:
        policies: What it keeps of each head group.
        keys: Of its blocks in the prefix cache.
        max_len: Most tokens of prompt and completion.
        dense_tokens: First tokens that may be computed many a step; those after them choose what
            they read, each alone. None: all tokens may be.
    """

    policies: tuple[HeadPolicy, ...]
    keys: PrefixKeys
    max_len: int
    dense_tokens: int | None = None


class Sequence:
    """Tokens, progress and cache of one completion.

    Args:
        request: What was asked.
        index: Which of its completions this is.
        plan: What the engine decided.
        tokenizer: For the text.
        seed: Of its random numbers.
        device: Where it samples.

    Attributes:
        token_ids: Prompt and completion.
        num_prompt_tokens: Length of the prompt.
        num_computed_tokens: Tokens whose K and V are in the cache.
        num_cached_tokens: Prompt tokens that the prefix cache had.
        cache_misses: Prompt tokens that it did not have, by reason.
        cache: Block tables while it runs, None while it waits.
        matcher: Keeps it to its structure, if it has one.
        prompt_logprobs: Of the prompt's tokens but the first, as far as they are known.
        started: When it first ran, in seconds of `time.monotonic`.
        num_shared_tokens: Tokens of its prompt in blocks that it got from another completion.
        num_passed: Sequences that were admitted before it although it was their better.
        kv_bytes_peak: Most bytes of cache that it held, `num_shared_tokens` left out.
        seen: bool [vocab_size], the tokens of prompt and completion; None until it is asked for.
        num_seen: Tokens that are in it.
        finish_reason: Set when it is done.
        stop_reason: The stop string or token that ended it.
    """

    def __init__(
        self,
        request: EngineRequest,
        index: int,
        plan: SequencePlan,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self.request = request
        self.index = index
        self.params = request.params
        self.policies = plan.policies
        self.max_len = plan.max_len
        self._dense_tokens = plan.dense_tokens
        self._keys = plan.keys
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.cache_misses: Mapping[str, int] = {}
        self.cache: SequenceCache | None = None
        self.matcher: StructureMatcher | None = None
        self.prompt_logprobs: list[PositionLogprobs] = []
        self.started: float | None = None
        self.num_shared_tokens = 0
        self.num_passed = 0
        self.kv_bytes_peak = 0
        self.seen: torch.Tensor | None = None
        self.num_seen = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.generator = torch.Generator(device)
        self.generator.manual_seed(seed)
        self._parked: list[Sequence] = []
        self._prefill_chunks: list[PrefillChunk] = []
        self._detokenizer = Detokenizer(
            tokenizer, self.token_ids, skip_special_tokens=self.params.skip_special_tokens
        )
        self._stop_strings = StopStrings(
            self.params.stop, include=self.params.include_stop_str_in_output
        )

    @property
    def request_id(self) -> str:
        """The client's handle, which all completions of a request share."""
        return self.request.request_id

    @property
    def keys(self) -> PrefixKeys:
        """Keys of all full blocks so far."""
        self._keys.extend(self.token_ids)
        return self._keys

    @property
    def output_token_ids(self) -> list[int]:
        """The completion so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        """Length of the completion so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens yet to be computed before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_chunk_tokens(self) -> int:
        """How many of its pending tokens one step may compute."""
        if self._dense_tokens is None:
            return self.num_pending_tokens
        # What decodes under a budget does so again after a preemption, or it would see more.
        dense = self._dense_tokens - self.num_computed_tokens
        return min(self.num_pending_tokens, max(1, dense))

    def num_alone(self, first: int, last: int) -> int:
        """How many of the tokens from `first` to before `last` take a step each."""
        return 0 if self._dense_tokens is None else max(0, last - max(first, self._dense_tokens))

    @property
    def decoding(self) -> bool:
        """Whether only its newest token is to be computed."""
        return self.num_pending_tokens == 1 and self.num_output_tokens > 0

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    @property
    def num_slots(self) -> int:
        """Places it takes among running sequences, those parked with it included."""
        return 1 + len(self._parked)

    @property
    def scores_prompt(self) -> bool:
        """Whether logits of its prompt are still wanted."""
        wanted = self.params.prompt_logprobs is not None and self.index == 0
        return wanted and len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    @property
    def has_prompt_logprobs(self) -> bool:
        """Whether the log probabilities of its prompt were wanted, and are known."""
        return self.params.prompt_logprobs is not None and self.index == 0

    @property
    def may_share_prefix(self) -> bool:
        """Whether blocks that others computed will do; logits need a pass of its own."""
        return not self.scores_prompt

    def park(self, others: list["Sequence"]) -> None:
        """Let the other completions of the request wait for this one's prompt."""
        self._parked = others

    def take_parked(self) -> list["Sequence"]:
        """Hand out those that wait for this one's prompt."""
        parked, self._parked = self._parked, []
        return parked

    def follow(self, other: "Sequence") -> None:
        """Take over what another completion of the request knows of their prompt."""
        self.started = other.started
        self.num_cached_tokens = other.num_cached_tokens
        self.cache_misses = other.cache_misses
        self._keys = other.keys.copy()

    def restart(self) -> None:
        """Forget what was computed: the blocks are gone."""
        self.num_computed_tokens = 0
        if self.scores_prompt:
            self.prompt_logprobs = []

    def note_prefill(self, ended: float, num_tokens: int) -> None:
        """Remember a chunk that was computed.

        Args:
            ended: When, in seconds of `time.monotonic`.
            num_tokens: Its size.
        """
        num_steps = 1
        if len(self._prefill_chunks) == MAX_PREFILL_CHUNKS:
            last = self._prefill_chunks.pop()
            num_tokens += last.num_tokens
            num_steps += last.num_steps
        self._prefill_chunks.append(PrefillChunk(ended, num_tokens, num_steps))

    def take_prefill_chunks(self) -> tuple[PrefillChunk, ...]:
        """Hand out the chunks that were computed since the last call."""
        chunks, self._prefill_chunks = self._prefill_chunks, []
        return tuple(chunks)

    def note_bytes(self, cache: KVCache) -> None:
        """Remember the most bytes of blocks that it held."""
        assert self.cache is not None
        own = cache.sequence_bytes(self.cache, since=self.num_shared_tokens)
        self.kv_bytes_peak = max(self.kv_bytes_peak, own)

    def reservation(self, match: PrefixMatch | None = None) -> Reservation:
        """What of the cache it may still come to need.

        Args:
            match: What it will share, if it has not begun.
        """
        asked = self.params.max_tokens
        if not self.request.asked_max_tokens:
            asked = min(asked, UNASKED_COMPLETION_TOKENS)
        # The last token of a completion is never computed, but one more is always on its way.
        length = max(self.num_prompt_tokens + asked - 1, len(self.token_ids) + 1)
        return Reservation(
            policies=self.policies,
            num_tokens=min(length, self.max_len),
            cache=self.cache,
            match=match,
            forks=len(self._parked),
            fork_tokens=self.num_prompt_tokens,
        )

    def append(self, token_id: int, eos_token_ids: frozenset[int]) -> str:
        """Add a sampled token and decide whether the completion ends.

        Args:
            token_id: The token.
            eos_token_ids: Tokens that end a completion of this model.

        Returns:
            Text that it makes safe to show.
        """
        self.token_ids.append(token_id)
        params = self.params
        ends = token_id in eos_token_ids and not params.ignore_eos
        if ends or token_id in params.stop_token_ids:
            # What ends the text is not part of it. Before min_tokens it is never sampled.
            self.finish_reason = "stop"
            self.stop_reason = token_id if token_id in params.stop_token_ids else None
            return self._flush()
        text = self._detokenizer.push(token_id)
        if self.num_output_tokens >= params.min_tokens:
            text, stop = self._stop_strings.push(text)
            if stop is not None:
                self.finish_reason, self.stop_reason = "stop", stop
                return text
        if self.matcher is not None:
            self.matcher.accept(token_id)
            if self.matcher.finished:
                self.finish_reason = "stop"
                return text + self._flush()
        full = len(self.token_ids) >= self.max_len
        if self.num_output_tokens >= params.max_tokens or full:
            self.finish_reason = "length"
            return text + self._flush()
        return text

    def _flush(self) -> str:
        """Text that waited for more, now that nothing more comes."""
        text, _ = self._stop_strings.push(self._detokenizer.finish())
        return text + self._stop_strings.finish()
