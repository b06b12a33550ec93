"""Logits of every position of a text, computed over the paged cache as serving would.

Serving keeps one row of logits a step. Here all rows of a chunk are wanted, of one sequence at a
time and over a cache that nobody else uses: for perplexity, and for comparing a compressed cache
with the full one token by token. Tokens that a server would have decoded under a retrieval budget
can be decoded so here too.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import HeadPolicy
from headlong.cache.sequence_cache import SequenceCache
from headlong.server.engine.batch import build_attention_batch, packed_positions
from headlong.server.engine.device import current
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.head_plan import plan_heads
from headlong.server.engine.memory import plan_arena
from headlong.server.engine.model import LoadedModel
from headlong.server.engine.runner import Runner, open_runner
from headlong.server.engine.selection import SelectionRule
from headlong.server.errors import ContextLengthError, InvalidRequestError

DEFAULT_CHUNK_TOKENS = 256


class PagedForward:
    """Runs one sequence at a time through a model and hands out all of its logits.

    Not thread-safe. What it owns of the cache between two calls is nothing.

    Args:
        runner: Computes with the model, over the cache's arena.
        cache: Owner of the blocks; others may own blocks of it too.
        max_model_len: Most tokens of a sequence.
        chunk_tokens: Tokens of one step; memory grows with it, logits do not depend on it.
        rule: When generated tokens choose pages; None if they read everything.

    Attributes:
        kv_bytes: Bytes of the blocks that the last sequence owned at its end; 0 before the first.

    Raises:
        ValueError: `chunk_tokens` is less than 1.
    """

    def __init__(
        self,
        runner: Runner,
        cache: KVCache,
        max_model_len: int,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        rule: SelectionRule | None = None,
    ) -> None:
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
        self._runner = runner
        self._cache = cache
        self._max_model_len = max_model_len
        self._chunk_tokens = chunk_tokens
        self._rule = rule
        self.kv_bytes = 0

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._runner.model.device

    def logits(
        self,
        token_ids: Sequence[int],
        policies: tuple[HeadPolicy, ...] | None = None,
        since: int = 0,
        num_prompt_tokens: int | None = None,
    ) -> Generator[torch.Tensor, None, None]:
        """Runs a sequence, chunk by chunk as the caller asks for them.

        Leaving the iterator early gives the blocks back when it is closed.

        Args:
            token_ids: At least one.
            policies: What each head group keeps; by default its own policy.
            since: First position whose logits are wanted.
            num_prompt_tokens: Where the prompt ends, if what follows is to be computed as if it
                were being generated: tokens that choose pages then come one a chunk.

        Yields:
            float32 [rows, vocab_size]: row i of all chunks together is what the model says of
            token `since` + i + 1. A chunk has `chunk_tokens` tokens, the last one what is left,
            and a row for each from `since` on.

        Raises:
            InvalidRequestError: There are no tokens, or one is not in the vocabulary.
            ContextLengthError: There are too many.
        """
        self._check(token_ids)
        sequence = self._cache.begin(policies)
        try:
            for start, end in self._chunks(len(token_ids), num_prompt_tokens):
                first_row = max(0, since - start)
                yield self._chunk(sequence, token_ids[start:end], first_row, num_prompt_tokens)
            self.kv_bytes = self._cache.sequence_bytes(sequence)
        finally:
            self._cache.free(sequence)

    def _chunks(self, num_tokens: int, num_prompt_tokens: int | None) -> Iterator[tuple[int, int]]:
        """First token of each chunk, and the one behind its last."""
        dense = num_tokens
        if self._rule is not None and num_prompt_tokens is not None:
            dense = min(num_tokens, self._rule.dense_tokens(num_prompt_tokens))
        for start in range(0, dense, self._chunk_tokens):
            yield start, min(start + self._chunk_tokens, dense)
        for start in range(dense, num_tokens):
            yield start, start + 1

    def _check(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise InvalidRequestError("the text has no tokens", "prompt")
        vocab_size = self._runner.model.vocab_size
        if not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            raise InvalidRequestError(f"a token id is not in 0 to {vocab_size - 1}", "prompt")
        if len(token_ids) > self._max_model_len:
            raise ContextLengthError(
                f"the text has {len(token_ids)} tokens; the longest is {self._max_model_len}",
                "prompt",
            )

    @torch.inference_mode()
    def _chunk(
        self,
        sequence: SequenceCache,
        token_ids: Sequence[int],
        first_row: int,
        num_prompt_tokens: int | None,
    ) -> torch.Tensor:
        count = len(token_ids)
        self._cache.extend(sequence, count)
        positions = packed_positions(np.array([sequence.num_tokens]), np.array([count]))
        selection = None
        if self._rule is not None:
            # A text without a prompt is one.
            prompt = sequence.num_tokens if num_prompt_tokens is None else num_prompt_tokens
            selection = self._rule.batch([sequence], [count], [prompt])
        with current(self._runner.model.device):
            logits = self._runner.forward(
                torch.tensor(token_ids),
                torch.from_numpy(positions),
                build_attention_batch([sequence], [count], selection),
                torch.arange(min(first_row, count), count),
            )
        self._cache.release_expired(sequence)
        return logits


def open_paged_forward(
    config: EngineConfig,
    model: LoadedModel,
    max_model_len: int,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> PagedForward:
    """Makes a `PagedForward` over an arena of its own, just large enough for one sequence.

    Args:
        config: The profile and what overrides it, block size, device and attention backend.
        model: The loaded model.
        max_model_len: Longest sequence.
        chunk_tokens: As in `PagedForward`.

    Raises:
        ConfigError: The profile, the device or the memory do not allow it.
    """
    sized = replace(
        config, max_num_seqs=1, max_num_batched_tokens=chunk_tokens, max_model_len=max_model_len
    )
    groups = plan_heads(sized, model)
    plan, layout = plan_arena(sized, model, groups)
    runner = open_runner(sized, model, groups, layout, plan.max_sequence_tokens)
    return PagedForward(
        runner,
        KVCache(groups, layout, copy_blocks=runner.copy_blocks),
        plan.max_sequence_tokens,
        chunk_tokens,
        SelectionRule.of(sized),
    )
