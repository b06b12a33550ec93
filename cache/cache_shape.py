"""What sizes a cache, and what of it is independent of how much memory there is."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from headlong.cache.groups import RETRIEVAL_HEADS, STREAMING, HeadGroup
from headlong.kernels.batch import UNBOUNDED
from headlong.kernels.layout import PageLayout, Quantisation


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What sizes a cache, beside its bytes.

    Attributes:
        groups: The model's head groups.
        head_dim: Elements of K, and of V, of one head and token.
        dtype: Of K and V as the layers make them, and of the pages if these are not quantised.
        block_size: Tokens of a page.
        max_num_seqs: Most sequences that run at once.
        max_num_batched_tokens: Most new tokens of one step.
        wide_tokens: Tokens that sequences with a wider policy than the streaming group's hold in
            all, beside the windows of the others.
        formats: Quantisation of the pages of each kind of head; kinds left out have none.
        summarised: Whether pages of retrieval heads know the bounds of their keys.
        compensated: Whether pages of streaming heads know the sums of what they drop.
        compensated_from: First layer that puts them to use.
        in_slabs: Whether the groups share the arena, if there are several and it is large enough.
    """

    groups: tuple[HeadGroup, ...]
    head_dim: int
    dtype: torch.dtype
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    wide_tokens: int = 0
    formats: Mapping[str, Quantisation] = field(default_factory=dict)
    summarised: bool = False
    compensated: bool = False
    compensated_from: int = 0
    in_slabs: bool = False

    def page(self, group: HeadGroup) -> PageLayout:
        """Layout of a group's pages."""
        compensated = self.compensated and group.kind == STREAMING
        return PageLayout(
            self.block_size,
            self.head_dim,
            self.dtype,
            self.formats.get(group.kind),
            summarised=self.summarised and group.kind == RETRIEVAL_HEADS,
            compensated=compensated,
            compensated_from=self.compensated_from if compensated else 0,
        )

    def block_bytes(self, group: HeadGroup) -> int:
        """Bytes of one block of a group."""
        return len(group.members) * self.page(group).page_bytes

    def token_bytes(self, group: HeadGroup) -> int:
        """Bytes that each further token of context adds to a group: 0 if it has a window."""
        return self.block_bytes(group) // self.block_size if group.policy.keeps_all else 0

    def window_bytes(self, group: HeadGroup) -> int:
        """Bytes of a group's window and sinks of one long sequence between steps."""
        if group.policy.keeps_all:
            return 0
        return group.policy.steady_blocks(UNBOUNDED, self.block_size) * self.block_bytes(group)

    @property
    def growing_token_bytes(self) -> int:
        """Bytes that each further token of context adds, over the groups that grow."""
        return sum(map(self.token_bytes, self.groups))

    @property
    def full_token_bytes(self) -> int:
        """Bytes of one token in a cache that keeps everything for every head."""
        return sum(self.block_bytes(group) for group in self.groups) // self.block_size

    @property
    def constant_sequence_bytes(self) -> int:
        """Bytes of the windows and sinks of one long sequence between steps."""
        return sum(map(self.window_bytes, self.groups))

    def sequence_bytes(self, num_tokens: int) -> int:
        """Bytes of one sequence of `num_tokens` tokens between steps."""
        return sum(
            count * self.block_bytes(group)
            for count, group in zip(self.sequence_blocks(num_tokens, 0), self.groups, strict=True)
        )

    def sequence_blocks(self, num_tokens: int, num_new: int) -> tuple[int, ...]:
        """Blocks of each group while the last `num_new` of `num_tokens` tokens are computed."""
        return tuple(
            group.policy.live_blocks(num_tokens - num_new, num_new, self.block_size)
            for group in self.groups
        )
