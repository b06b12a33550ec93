"""How many blocks each group gets, and what that holds. The one place that sizes an arena.

Groups that share the arena need no shares: it is cut into slabs, and what fits is a matter of how
many slabs the blocks of all groups fill. It gets all memory that sequences could have a use for,
those that widen the streaming group included.

Otherwise each group has its share from the start. A group with a window needs a constant number of
blocks a sequence, and during a step also blocks for the step's new tokens; it is given enough for
every sequence that may run. The streaming group also gets what is set aside for requests that keep
more of it. All the rest goes to the groups that grow with the context. Where that would leave them
less than half of the memory, the windows are sized for as many sequences as fit into the other
half.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import mul

from headlong.cache.cache_shape import CacheShape
from headlong.cache.groups import SLIDING, STREAMING, HeadGroup
from headlong.cache.policy import RETRIEVAL
from headlong.cache.slab_size import choose_slab_bytes
from headlong.cache.slabs import slabs_needed
from headlong.kernels.layout import (
    GROUP_ALIGNMENT_BYTES,
    ArenaLayout,
    blocks_in_slab,
    build_arena_layout,
    build_slab_layout,
)

MAX_SLOTS = 1 << 31
"""Kernels number the tokens that a group has room for in 32 bits."""


class CapacityError(ValueError):
    """The memory is too small for even one sequence."""


def plan_blocks(shape: CacheShape, budget_bytes: int, max_model_len: int) -> tuple[int, ...]:
    """Share a budget among the groups.

    The windows get what all sequences that may run need, but no more than half of the budget while
    the growing groups could use the rest, and never less than one sequence needs.

    Args:
        shape: The cache's shape.
        budget_bytes: Most bytes of all groups together.
        max_model_len: Longest sequence in tokens; no group gets more blocks than all sequences of
            this length could own.

    Returns:
        Number of blocks of each group. More memory never makes a growing group smaller.

    Raises:
        CapacityError: Not even one sequence of one block's length fits.
    """
    budget = budget_bytes - len(shape.groups) * GROUP_ALIGNMENT_BYTES
    longest = -(-max_model_len // shape.block_size)
    growing_block_bytes = sum(
        shape.block_bytes(group) for group in shape.groups if group.policy.keeps_all
    )
    useful = shape.max_num_seqs * longest * growing_block_bytes
    for_growing = min(
        useful, max(budget - _window_bytes(shape, shape.max_num_seqs, max_model_len), budget // 2)
    )
    num_seqs = shape.max_num_seqs
    while num_seqs > 1 and _window_bytes(shape, num_seqs, max_model_len) > budget - for_growing:
        num_seqs -= 1
    for_growing = min(for_growing, budget - _window_bytes(shape, num_seqs, max_model_len))
    if for_growing < growing_block_bytes:
        raise CapacityError(
            f"{budget_bytes} bytes hold no sequence: its windows take "
            f"{_window_bytes(shape, 1, max_model_len)} bytes and each {shape.block_size} tokens "
            f"{growing_block_bytes} more"
        )
    return tuple(
        for_growing // growing_block_bytes
        if group.policy.keeps_all
        else _window_blocks(shape, group, num_seqs, max_model_len)
        for group in shape.groups
    )


def _window_blocks(shape: CacheShape, group: HeadGroup, num_seqs: int, max_model_len: int) -> int:
    """Blocks of a group with a window for `num_seqs` sequences, in the middle of a step."""
    longest = -(-max_model_len // shape.block_size)
    steady = num_seqs * group.policy.steady_blocks(max_model_len, shape.block_size)
    new_tokens = min(shape.max_num_batched_tokens, num_seqs * max_model_len)
    # Each chunk of a step may begin and end inside a block.
    step = -(-new_tokens // shape.block_size) + num_seqs
    # A model's own windows stay what they are, whatever a request asks for.
    wide = -(-shape.wide_tokens // shape.block_size) if group.name == STREAMING else 0
    return min(steady + step + wide, num_seqs * longest)


def _window_bytes(shape: CacheShape, num_seqs: int, max_model_len: int) -> int:
    return sum(
        _window_blocks(shape, group, num_seqs, max_model_len) * shape.block_bytes(group)
        for group in shape.groups
        if not group.policy.keeps_all
    )


def longest_sequence(shape: CacheShape, num_blocks: Sequence[int], max_model_len: int) -> int:
    """Most tokens, up to `max_model_len`, of a sequence that has the cache to itself."""
    longest = max_model_len
    for group, blocks in zip(shape.groups, num_blocks, strict=True):
        if group.policy.keeps_all:
            longest = min(longest, blocks * shape.block_size)
    return longest


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What was sized, for people and metrics. Bytes and tokens.

    Attributes:
        shape: What was asked.
        num_blocks: Most blocks that each group can have; where groups share the arena, one group
            can if the others have none.
        arena_bytes: The whole arena.
        max_sequence_tokens: Longest sequence that fits alone.
        num_slabs: Slabs that the groups share; 0 if each has its own blocks.
        slab_bytes: Bytes of one.
    """

    shape: CacheShape
    num_blocks: tuple[int, ...]
    arena_bytes: int
    max_sequence_tokens: int
    num_slabs: int = 0
    slab_bytes: int = 0

    @property
    def full_cache_tokens(self) -> int:
        """Tokens in all that a full cache of the same bytes would hold."""
        return self.arena_bytes // self.shape.full_token_bytes

    @property
    def cache_tokens(self) -> int | None:
        """Tokens in all that the growing groups hold; None if no group grows.

        Where groups share the arena, those of sequences of the greatest length, and of a shorter
        one in what these leave.
        """
        if self.num_slabs:
            return self._tokens_in_slabs()
        growing = [
            blocks * self.shape.block_size
            for blocks, group in zip(self.num_blocks, self.shape.groups, strict=True)
            if group.policy.keeps_all
        ]
        return min(growing, default=None)

    def holds(self, num_seqs: int, num_tokens: int) -> bool:
        """Whether so many sequences of so many tokens can run at once, none evicted.

        It is what admission asks: every one at its full length, in a step of one token.
        """
        return self._hold(self._step_blocks(num_tokens, num_seqs))

    def _step_blocks(self, num_tokens: int, num_seqs: int = 1) -> list[int]:
        """Blocks of each group of so many sequences, in a step of a token of each."""
        return [
            num_seqs * group.policy.step_blocks(num_tokens, self.shape.block_size)
            for group in self.shape.groups
        ]

    def _hold(self, owned: Sequence[int]) -> bool:
        if self.num_slabs:
            wide = -(-self.shape.wide_tokens // self.shape.block_size)
            owned = [
                count + (wide if group.name == STREAMING else 0)
                for count, group in zip(owned, self.shape.groups, strict=True)
            ]
            sizes = [most // self.num_slabs for most in self.num_blocks]
            return slabs_needed(owned, sizes) <= self.num_slabs
        return all(count <= most for count, most in zip(owned, self.num_blocks, strict=True))

    def _tokens_in_slabs(self) -> int | None:
        if not self.shape.growing_token_bytes:
            return None
        length, most = self.max_sequence_tokens, self.shape.max_num_seqs
        # One does; of more, the first number that is too many, less one.
        full = 1 + bisect_left(
            range(2, most + 1), True, key=lambda count: not self.holds(count, length)
        )
        if full == most:
            return full * length
        held = self._step_blocks(length, full)

        def lacks(num_tokens: int) -> bool:
            rest = self._step_blocks(num_tokens)
            return not self._hold([own + more for own, more in zip(held, rest, strict=True)])

        return full * length + bisect_left(range(1, length), True, key=lacks)

    def sequence_bytes(self, num_tokens: int) -> int:
        """Bytes of one sequence of `num_tokens` tokens between steps."""
        return self.shape.sequence_bytes(num_tokens)

    def full_sequence_bytes(self, num_tokens: int) -> int:
        """Bytes of the same sequence if every head kept everything."""
        blocks = RETRIEVAL.live_blocks(num_tokens, 0, self.shape.block_size)
        return blocks * self.shape.block_size * self.shape.full_token_bytes


def plan_memory(
    shape: CacheShape, budget_bytes: int, max_model_len: int
) -> tuple[MemoryPlan, ArenaLayout]:
    """Size an arena and lay it out.

    Args:
        shape: The cache's shape.
        budget_bytes: Most bytes of the arena.
        max_model_len: Longest sequence in tokens.

    Returns:
        The plan and the arena's map.

    Raises:
        CapacityError: Not even one sequence fits.
    """
    shared = plan_slabs(shape, budget_bytes, max_model_len) if shape.in_slabs else None
    try:
        fixed = lay_out(shape, plan_blocks(shape, budget_bytes, max_model_len), max_model_len)
    except CapacityError:
        if shared is None:
            raise
        return shared
    # A few slabs leave too much at their ends.
    if shared is None or shared[0].max_sequence_tokens < fixed[0].max_sequence_tokens:
        return fixed
    return shared


def plan_slabs(
    shape: CacheShape, budget_bytes: int, max_model_len: int
) -> tuple[MemoryPlan, ArenaLayout] | None:
    """Let the groups share an arena.

    Args:
        shape: The cache's shape.
        budget_bytes: Most bytes of the arena.
        max_model_len: Longest sequence in tokens; there are no more slabs than all sequences of
            this length could use, if they kept everything for streaming heads.

    Returns:
        The plan and the arena's map; None if there is one group, or slabs hold no sequence.
    """
    longest = -(-max_model_len // shape.block_size)
    useful = [
        _window_blocks(shape, group, shape.max_num_seqs, max_model_len)
        if group.kind == SLIDING
        else shape.max_num_seqs * longest
        for group in shape.groups
    ]
    block_bytes = [shape.block_bytes(group) for group in shape.groups]
    useful_bytes = sum(map(mul, useful, block_bytes))
    slab_bytes = choose_slab_bytes(block_bytes, min(budget_bytes, useful_bytes))
    if len(shape.groups) == 1 or slab_bytes is None:
        return None
    sizes = [blocks_in_slab(slab_bytes, each) for each in block_bytes]
    num_slabs = min(budget_bytes // slab_bytes, slabs_needed(useful, sizes))
    layout = build_slab_layout(
        members=tuple(group.members for group in shape.groups),
        pages=tuple(map(shape.page, shape.groups)),
        slab_bytes=slab_bytes,
        num_slabs=num_slabs,
    )
    plan = MemoryPlan(
        shape=shape,
        num_blocks=tuple(size * num_slabs for size in sizes),
        arena_bytes=layout.total_bytes,
        max_sequence_tokens=max_model_len,
        num_slabs=num_slabs,
        slab_bytes=slab_bytes,
    )
    # The first length that does not fit, less one.
    longest_held = bisect_left(
        range(1, max_model_len + 1), True, key=lambda length: not plan.holds(1, length)
    )
    too_many_slots = max(layout.num_blocks) * shape.block_size >= MAX_SLOTS
    if longest_held == 0 or too_many_slots:
        return None
    return replace(plan, max_sequence_tokens=longest_held), layout


def lay_out(
    shape: CacheShape, num_blocks: tuple[int, ...], max_model_len: int
) -> tuple[MemoryPlan, ArenaLayout]:
    """Lay an arena out.

    Args:
        shape: The cache's shape.
        num_blocks: Blocks of each group.
        max_model_len: Longest sequence in tokens.

    Returns:
        The plan and the arena's map.
    """
    layout = build_arena_layout(
        members=tuple(group.members for group in shape.groups),
        pages=tuple(map(shape.page, shape.groups)),
        num_blocks=num_blocks,
    )
    plan = MemoryPlan(
        shape=shape,
        num_blocks=num_blocks,
        arena_bytes=layout.total_bytes,
        max_sequence_tokens=longest_sequence(shape, num_blocks, max_model_len),
    )
    return plan, layout
