"""Where a step meets the model and its arena: on one device, or on this rank of several."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

import torch

from headlong.cache.arena import Arena
from headlong.cache.block_copy import BlockCopy
from headlong.cache.groups import HeadGroup
from headlong.kernels.backend import AttentionBackend, make_backend
from headlong.kernels.batch import AttentionBatch
from headlong.kernels.layout import ArenaLayout
from headlong.server.engine.attention import PagedStep
from headlong.server.engine.device import choose_attention, to_device
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.memory import arena_param
from headlong.server.engine.model import LoadedModel
from headlong.server.engine.rank_plan import local_arena
from headlong.server.engine.selection import SelectionRule
from headlong.server.errors import ConfigError


class Runner(Protocol):
    """Computes steps, wherever the model and the arena are."""

    @property
    def model(self) -> LoadedModel:
        """The model, or what of it is computed here."""
        ...

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Compute K and V of a packed batch into the arena, and logits.

        All arguments lie in the memory of the CPU.

        Args:
            token_ids: int64 [total_tokens].
            positions: int64 [total_tokens], of each token in its own sequence.
            batch: The batch's tables.
            rows: int64 [num_rows], tokens whose logits are wanted.

        Returns:
            float32 [num_rows, vocab_size], on the model's device.
        """
        ...

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """Copy whole blocks, before what is computed next."""
        ...


class LocalRunner:
    """Computes on this process's device.

    Args:
        model: The model, or this rank's share of it.
        arena: Its cache.
        attention: The backend over the arena.
        groups: For each group of the arena, its index among the model's groups.
    """

    def __init__(
        self,
        model: LoadedModel,
        arena: Arena,
        attention: AttentionBackend[Any],
        groups: tuple[int, ...],
    ) -> None:
        self.model = model
        self.arena = arena
        self.attention = attention
        self._groups = groups

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """As `Runner.forward`."""
        device = self.model.device
        own = replace(batch, groups=tuple(batch.groups[group] for group in self._groups))
        return self.model.forward(
            to_device(token_ids, device),
            to_device(positions, device),
            to_device(rows, device),
            PagedStep(self.attention, self.attention.plan(own)),
        )

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """As `Runner.copy_blocks`."""
        self.arena.copy_blocks(
            replace(copy, group=self._groups.index(copy.group))
            for copy in copies
            if copy.group in self._groups
        )


def open_runner(
    config: EngineConfig,
    model: LoadedModel,
    groups: tuple[HeadGroup, ...],
    layout: ArenaLayout,
    max_context: int,
) -> LocalRunner:
    """Allocate the arena, or this rank's, and what attends over it.

    Args:
        config: Names the attention backend.
        model: The loaded model.
        groups: Its head groups.
        layout: The map of the whole cache.
        max_context: Longest sequence, in tokens.

    Raises:
        ConfigError: There is no memory for the arena, or the backend does not do what the model
            needs.
    """
    local = local_arena(layout, groups, model.share)
    try:
        arena = Arena(local.layout, model.device)
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"cannot allocate {local.layout.total_bytes} bytes of KV cache",
            arena_param(config, model.device),
        ) from error
    num_q_heads = model.geometry.num_q_heads // model.num_ranks
    backend = choose_attention(config, model.device)
    rule = SelectionRule.of(config)
    selection = None if rule is None else rule.settings(max_context)
    try:
        attention = make_backend(backend, arena.memory, local.layout, num_q_heads, selection)
    except ValueError as error:
        # A kernel may lack the model's head size or dtype.
        raise ConfigError(
            f"{error}; attention_backend 'torch' does without", "attention_backend"
        ) from error
    return LocalRunner(model, arena, attention, local.groups)
