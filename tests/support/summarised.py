"""Sequences that grow step by step in an arena whose pages know bounds and sums."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from headlong.cache.block_copy import BlockCopy
from headlong.cache.groups import HeadGroup, build_head_groups
from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import HeadPolicy
from headlong.kernels import reference
from headlong.kernels.batch import AttentionBatch
from headlong.kernels.layout import (
    QUANTISATIONS,
    ArenaLayout,
    PageLayout,
    build_arena_layout,
    view_pages,
)
from headlong.server.engine.batch import build_attention_batch

RETRIEVAL = ((True, False, True), (False, False, False))
"""By layer and KV head: heads that are no neighbours, and a layer without one group."""

Append = Callable[[int, torch.Tensor, torch.Tensor, AttentionBatch], None]
"""Layer, then K and V [total_tokens, num_kv_heads, head_dim], and the batch."""


@dataclass(frozen=True)
class Setting:
    """A cache whose retrieval heads have bounds and whose streaming heads have sums.

    Attributes:
        streaming: Policy of the streaming heads.
        block_size: Tokens of a page.
        head_dim: Elements.
        dtype: Of K and V.
        retrieval_format: Name of the quantisation of the retrieval heads' pages.
        streaming_format: Likewise.
        num_blocks: Of each group.
        compensated_from: First layer that puts the sums to use.
    """

    streaming: HeadPolicy = field(default_factory=lambda: HeadPolicy(5, 12))
    block_size: int = 8
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    retrieval_format: str | None = None
    streaming_format: str | None = None
    num_blocks: int = 256
    compensated_from: int = 0

    @property
    def groups(self) -> tuple[HeadGroup, ...]:
        return build_head_groups(RETRIEVAL, self.streaming, (None,) * len(RETRIEVAL))

    @property
    def layout(self) -> ArenaLayout:
        plain = PageLayout(self.block_size, self.head_dim, self.dtype)
        formats = [
            None if name is None else QUANTISATIONS[name]
            for name in (self.retrieval_format, self.streaming_format)
        ]
        return build_arena_layout(
            members=tuple(group.members for group in self.groups),
            pages=(
                replace(plain, quantisation=formats[0], summarised=True),
                replace(
                    plain,
                    quantisation=formats[1],
                    compensated=True,
                    compensated_from=self.compensated_from,
                ),
            ),
            num_blocks=(self.num_blocks,) * 2,
        )


class Growing:
    """Sequences in an arena; a token's K and V depend on it alone.

    Args:
        setting: The cache.
        make_append: From an arena and its layout to what writes K and V into it.
        policies: Of each sequence's streaming heads; None is the setting's.
        seed: Of the tokens.
        longest: Most tokens of a sequence.
        former: What each float32 of the arena is at first; None is NaN in every dtype.

    Attributes:
        summaries: By sequence, group, page and logical block, what was last said of it.
    """

    def __init__(
        self,
        setting: Setting,
        make_append: Callable[[torch.Tensor, ArenaLayout], Append],
        policies: Sequence[HeadPolicy | None] = (None,),
        *,
        seed: int = 0,
        longest: int = 1024,
        former: float | None = None,
    ) -> None:
        self.layout = setting.layout
        self.arena = torch.full((self.layout.total_bytes,), 255, dtype=torch.uint8)
        if former is not None:
            self.arena.view(torch.float32).fill_(former)
        self.cache = KVCache(setting.groups, self.layout, copy_blocks=self._copy_blocks)
        self.sequences = [self.cache.begin(self.cache.policies(each)) for each in policies]
        rng = torch.Generator().manual_seed(seed)
        shape = len(policies), len(RETRIEVAL), 2, longest, len(RETRIEVAL[0]), setting.head_dim
        self.tokens = torch.randn(*shape, generator=rng).to(setting.dtype)
        self.summaries: dict[tuple[int, int, int, int], torch.Tensor] = {}
        self._append = make_append(self.arena, self.layout)

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        for copy in copies:
            blocks = self.layout.view_group(self.arena, copy.group)
            blocks[copy.target] = blocks[copy.source]

    def step(self, num_new: Sequence[int]) -> AttentionBatch:
        """Append so many tokens of each sequence; those with none are not in the batch."""
        chosen = [seq for seq, count in enumerate(num_new) if count]
        for seq in chosen:
            self.cache.release_expired(self.sequences[seq])
            self.cache.extend(self.sequences[seq], num_new[seq])
        batch = self.batch(chosen, [num_new[seq] for seq in chosen])
        for layer in range(len(RETRIEVAL)):
            key, value = self.new_tokens(layer, chosen, num_new)
            self._append(layer, key, value, batch)
        self._record(chosen)
        return batch

    def batch(self, chosen: Sequence[int], num_new: Sequence[int]) -> AttentionBatch:
        """Tables of some sequences."""
        return build_attention_batch([self.sequences[seq] for seq in chosen], num_new)

    def new_tokens(
        self, layer: int, chosen: Sequence[int], num_new: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the last tokens of some sequences, side by side."""
        rows = [
            self.tokens[seq, layer][:, end - num_new[seq] : end]
            for seq in chosen
            for end in [self.sequences[seq].num_tokens]
        ]
        key, value = torch.cat(rows, dim=1)
        return key, value

    def _record(self, chosen: Sequence[int]) -> None:
        for group, table_of in enumerate(zip(*(s.tables for s in self.sequences), strict=True)):
            views = view_pages(self.layout, self.arena, group)
            section = views.bounds if views.bounds is not None else views.sums
            assert section is not None
            for seq in chosen:
                for logical in range(table_of[seq].num_logical_blocks):
                    block = table_of[seq].find(logical)
                    for page in range(self.layout.group_pages[group]):
                        if block is not None:
                            place = seq, group, page, logical
                            self.summaries[place] = section[block, page].clone()


def by_reference(arena: torch.Tensor, layout: ArenaLayout) -> Append:
    """The oracle."""

    def append(layer: int, key: torch.Tensor, value: torch.Tensor, batch: AttentionBatch) -> None:
        reference.append(arena, layout, layer, key, value, batch)

    return append


def check_summaries(found: Growing, expected: Growing, *, rounds: bool = True) -> None:
    """Bounds are the same to the bit; sums as near as float32 sums in another order.

    Args:
        found: What is tested.
        expected: What the reference did with the same tokens.
        rounds: Whether bounds of quantised keys are rounded to the page's dtype; if not, cut off.
    """
    assert found.summaries.keys() == expected.summaries.keys()
    for place, one in found.summaries.items():
        other = expected.summaries[place]
        quantised = found.layout.pages[place[1]].quantisation is not None
        if place[1] == 0 and (rounds or not quantised):
            assert torch.equal(one, other), place
        elif place[1] == 0:
            assert (one.double() - other).abs().max() <= 2**-7 * other.abs().max(), place
        else:
            assert (one - other).norm() <= 1e-5 * (1 + other.norm()), place
