"""Block tables of all sequences over all head groups: who holds what, and when it is given back.

call                    effect on a sequence's tables
begin                   empty tables, one a group
extend                  blocks for the tokens of the coming step
release_expired         after the step: blocks that the visibility law can never reach again
fork                    a second sequence with the same tokens; full blocks are shared
free                    everything is given back
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headlong.cache.block_pool import BlockPool, OutOfBlocksError
from headlong.cache.block_table import BlockTable
from headlong.cache.groups import HeadGroup
from headlong.cache.policy import HeadPolicy
from headlong.kernels.layout import ArenaLayout


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Contents that must be copied before the next step writes."""

    group: int
    source: int
    target: int


class SequenceCache:
    """One sequence's block tables, one a head group.

    Attributes:
        tables: In the order of the groups.
        num_tokens: Tokens that the tables have room for and that are, or are about to be, cached.
    """

    __slots__ = ("num_tokens", "tables")

    def __init__(self, tables: tuple[BlockTable, ...]) -> None:
        self.tables = tables
        self.num_tokens = 0


class KVCache:
    """Bookkeeping of the arena's blocks. Holds no memory: `cache.arena.Arena` does.

    Args:
        groups: The model's head groups.
        layout: The arena's map for these groups.
    """

    def __init__(self, groups: Sequence[HeadGroup], layout: ArenaLayout) -> None:
        self.groups = tuple(groups)
        self.layout = layout
        self.pools = tuple(BlockPool(num_blocks) for num_blocks in layout.num_blocks)
        self._live: set[SequenceCache] = set()

    def begin(self) -> SequenceCache:
        """A sequence without tokens."""
        sequence = SequenceCache(
            tuple(
                BlockTable(group.policy, page.block_size)
                for group, page in zip(self.groups, self.layout.pages, strict=True)
            )
        )
        self._live.add(sequence)
        return sequence

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of this length could run if it had the cache to itself."""
        return all(
            # One block more than its window, so that a step of one token at least can run.
            min(policy.steady_blocks(num_tokens, size) + 1, -(-num_tokens // size)) <= num_blocks
            for policy, size, num_blocks in self._sizes()
        )

    def has_room(self, num_tokens: int, growing: Iterable[tuple[SequenceCache, int]]) -> bool:
        """Whether a new sequence fits beside others that have yet to grow.

        Args:
            num_tokens: Length the new sequence will reach.
            growing: Sequences and the lengths they will reach.
        """
        growing = list(growing)
        for group, (policy, size, _) in enumerate(self._sizes()):
            promised = sum(
                max(0, policy.steady_blocks(length, size) - len(sequence.tables[group].blocks))
                for sequence, length in growing
            )
            if policy.steady_blocks(num_tokens, size) + promised > self.pools[group].num_free:
                return False
        return True

    def _sizes(self) -> Iterable[tuple[HeadPolicy, int, int]]:
        for group, page, pool in zip(self.groups, self.layout.pages, self.pools, strict=True):
            yield group.policy, page.block_size, pool.num_blocks

    def max_extension(self, sequence: SequenceCache, num_tokens: int) -> int:
        """How many of `num_tokens` more tokens fit into what the sequence has and what is free."""
        room = num_tokens
        for table, pool in zip(sequence.tables, self.pools, strict=True):
            capacity = (table.num_logical_blocks + pool.num_free) * table.block_size
            room = min(room, capacity - sequence.num_tokens)
        return max(0, room)

    def extend(self, sequence: SequenceCache, num_tokens: int) -> None:
        """Give the sequence blocks for `num_tokens` more tokens in every group.

        Raises:
            OutOfBlocksError: A group has too few free blocks; nothing was taken.
            ValueError: The sequence was freed before.
        """
        self._require_live(sequence)
        total = sequence.num_tokens + num_tokens
        missing = [table.missing_blocks(total) for table in sequence.tables]
        for count, pool, group in zip(missing, self.pools, self.groups, strict=True):
            if count > pool.num_free:
                raise OutOfBlocksError(
                    f"{count} {group.name} blocks asked for, {pool.num_free} free"
                )
        for count, table, pool in zip(missing, sequence.tables, self.pools, strict=True):
            table.add(pool.allocate(count))
        sequence.num_tokens = total

    def release_expired(self, sequence: SequenceCache) -> None:
        """Give back what no later query of the sequence can see."""
        self._require_live(sequence)
        for table, pool in zip(sequence.tables, self.pools, strict=True):
            pool.release(table.take_expired(sequence.num_tokens))

    def fork(self, parent: SequenceCache) -> tuple[SequenceCache, list[BlockCopy]]:
        """A second sequence with the parent's tokens.

        Full blocks are shared. A block that is only partly filled is the child's own, because both
        will write into it.

        Returns:
            The child, and the copies that must be made before either goes on.

        Raises:
            OutOfBlocksError: No free block for a copy; nothing was taken.
        """
        self._require_live(parent)
        partial = [
            len(table.blocks) > 0 and parent.num_tokens % table.block_size > 0
            for table in parent.tables
        ]
        for needed, pool in zip(partial, self.pools, strict=True):
            if needed > pool.num_free:
                raise OutOfBlocksError("no free block for the copy of a partly filled one")
        child = self.begin()
        copies: list[BlockCopy] = []
        for group, (source, target) in enumerate(zip(parent.tables, child.tables, strict=True)):
            target.window_start = source.window_start
            shared = source.blocks[:-1] if partial[group] else source.blocks[:]
            self.pools[group].share(shared)
            target.add(shared.tolist())
            if partial[group]:
                (own,) = self.pools[group].allocate(1)
                target.add([own])
                copies.append(BlockCopy(group, source.blocks[-1], own))
        child.num_tokens = parent.num_tokens
        return child, copies

    def free(self, sequence: SequenceCache) -> None:
        """Give back everything the sequence holds; it is not to be used again.

        Raises:
            ValueError: It was freed before.
        """
        self._require_live(sequence)
        self._live.remove(sequence)
        for table, pool in zip(sequence.tables, self.pools, strict=True):
            pool.release(table.blocks)

    def _require_live(self, sequence: SequenceCache) -> None:
        if sequence not in self._live:
            raise ValueError("the sequence was freed before")

    @property
    def owned_blocks(self) -> tuple[int, ...]:
        """Owned blocks of each group."""
        return tuple(pool.num_owned for pool in self.pools)

    @property
    def owned_bytes(self) -> int:
        """Bytes of all owned blocks."""
        return sum(
            pool.num_owned * self.layout.block_bytes(group) for group, pool in enumerate(self.pools)
        )

    def sequence_bytes(self, sequence: SequenceCache) -> int:
        """Bytes of the blocks that a sequence holds, shared ones included."""
        return sum(
            len(table.blocks) * self.layout.block_bytes(group)
            for group, table in enumerate(sequence.tables)
        )

    def check_integrity(self) -> None:
        """Prove that every block is free or owned by exactly the live tables that list it.

        Raises:
            AssertionError: A block leaked, or a table lacks blocks for its tokens.
        """
        for group, pool in enumerate(self.pools):
            pool.check_integrity(_held(self._live, group))
        for sequence in self._live:
            for table in sequence.tables:
                assert table.missing_blocks(sequence.num_tokens) == 0


def _held(sequences: Iterable[SequenceCache], group: int) -> Iterable[int]:
    for sequence in sequences:
        yield from sequence.tables[group].blocks
