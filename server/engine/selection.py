"""Which tokens read chosen pages alone, and what a batch says of it.

A token under a budget sees less of its context than one of a prompt, so that what it leaves in the
cache depends on where the prompt ended:

    position < num_prompt_tokens    reads all; prompts are computed many tokens a step
    position < exact_tokens         reads all, because the budget covers it, many tokens a step
    any other                       is computed alone in its chunk and reads what it chooses

It chooses anew where every way to compute the sequence has to begin: at the first generated token,
and at the first one of a block, as the prefix cache hands out whole blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headlong.cache.sequence_cache import SequenceCache
from headlong.kernels.batch import UNBOUNDED, SelectionBatch, SelectionSettings
from headlong.server.engine.engine_config import EngineConfig

SCORED_SEQUENCES = 3
"""Sequences that are scored while none runs: the canary's two, and a reader's."""


@dataclass(frozen=True, slots=True)
class SelectionRule:
    """When generated tokens of an engine choose pages.

    Attributes:
        budget_tokens: Most tokens that such a token reads, a page's whole or none.
        block_size: Tokens of a page.
        reuse_steps: Tokens that share a choice.
        min_similarity: As in `SelectionSettings`.
        num_places: As in `SelectionSettings`; place 0 is that of all who read everything.
    """

    budget_tokens: int
    block_size: int
    reuse_steps: int
    min_similarity: float | None
    num_places: int

    @classmethod
    def of(cls, config: EngineConfig) -> "SelectionRule | None":
        """An engine's rule; None if all its tokens read everything."""
        if config.retrieval_budget is None:
            return None
        return cls(
            config.retrieval_budget,
            config.block_size,
            config.selection_reuse_steps,
            config.selection_min_similarity,
            1 + max(config.max_num_seqs, SCORED_SEQUENCES),
        )

    @property
    def exact_tokens(self) -> int:
        """Longest context that the budget covers."""
        return self.budget_tokens // self.block_size * self.block_size

    def dense_tokens(self, num_prompt_tokens: int) -> int:
        """First tokens of a sequence that read all; those after them are computed one a step."""
        return max(num_prompt_tokens, self.exact_tokens)

    def settings(self, max_context: int) -> SelectionSettings:
        """What an attention backend has to know.

        Args:
            max_context: Longest sequence.
        """
        return SelectionSettings(
            self.budget_tokens, self.num_places, max_context, self.min_similarity
        )

    def batch(
        self,
        caches: Sequence[SequenceCache],
        num_new: Sequence[int],
        num_prompt_tokens: Sequence[int],
    ) -> SelectionBatch:
        """What each sequence of a batch reads.

        Args:
            caches: Each sequence's tables, already extended by its new tokens.
            num_new: New tokens of each sequence.
            num_prompt_tokens: Of each sequence; what follows was generated.

        Returns:
            The batch's part, in the memory of the CPU.
        """
        positions = np.array([cache.num_tokens for cache in caches]) - 1
        prompts = np.asarray(num_prompt_tokens)
        places = np.array([cache.place for cache in caches])
        assert places.max() < self.num_places, "more sequences than the engine runs at once"
        bounded = (np.asarray(num_new) == 1) & (positions >= prompts)
        begins = positions % self.block_size % self.reuse_steps == 0
        return SelectionBatch(
            budgets=_int32(np.where(bounded, self.budget_tokens, UNBOUNDED)),
            places=_int32(np.where(bounded, places, 0)),
            renews=torch.from_numpy(~bounded | begins | (positions == prompts)),
        )


def _int32(values: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32))
