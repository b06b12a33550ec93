"""Block tables of all sequences over all head groups: who holds what, and when it is given back.

call                    effect on a sequence's tables
match                   none: says which prefix could be shared
begin                   empty tables, or those of a shared prefix
extend                  blocks for the tokens of the coming step
publish                 after the step: full blocks can be found by others
release_expired         then: blocks that the visibility law can never reach again are given back
fork                    a second sequence with the same tokens; full blocks are shared
free                    everything is given back; what can be found stays until it is evicted
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headlong.cache.block_pool import BlockPool, OutOfBlocksError
from headlong.cache.block_table import BlockTable
from headlong.cache.groups import STREAMING, HeadGroup
from headlong.cache.policy import HeadPolicy
from headlong.cache.prefix_keys import PrefixKeys
from headlong.cache.prefix_match import PrefixMatch, match_prefix
from headlong.cache.reservation import Reservation, most_owned
from headlong.cache.sequence_cache import SequenceCache
from headlong.kernels.layout import ArenaLayout

REMEMBERED_PREFIXES = 4096
"""First blocks whose salt is remembered, to tell a miss that a salt explains."""


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Contents that must be copied before the next step writes."""

    group: int
    source: int
    target: int


class KVCache:
    """Bookkeeping of the arena's blocks. Holds no memory: `cache.arena.Arena` does.

    Args:
        groups: The model's head groups.
        layout: The arena's map for these groups.
        prefix_caching: Whether blocks can be found by other sequences.
        namespace: What determines K and V beside tokens and policies.

    Raises:
        ValueError: With prefix caching, groups differ in their block size.
    """

    def __init__(
        self,
        groups: Sequence[HeadGroup],
        layout: ArenaLayout,
        *,
        prefix_caching: bool = True,
        namespace: bytes = b"",
    ) -> None:
        self.groups = tuple(groups)
        self.layout = layout
        self._block_sizes = tuple(page.block_size for page in layout.pages)
        if prefix_caching and len(set(self._block_sizes)) > 1:
            raise ValueError(f"a prefix cache needs one block size, got {self._block_sizes}")
        self.block_size = self._block_sizes[0]
        self.pools = tuple(BlockPool(num_blocks) for num_blocks in layout.num_blocks)
        self._own_policies = tuple(group.policy for group in self.groups)
        self._prefix_caching = prefix_caching
        self._namespace = namespace
        self._live: set[SequenceCache] = set()
        # The first block of a prefix without its salt, to the salt that was seen last.
        self._salts: OrderedDict[bytes, str] = OrderedDict()

    def policies(self, streaming: HeadPolicy | None = None) -> tuple[HeadPolicy, ...]:
        """What a sequence keeps of each group.

        Args:
            streaming: In place of what the streaming heads keep; a model's own windows stay.
        """
        if streaming is None:
            return self._own_policies
        return tuple(
            streaming if group.name == STREAMING else group.policy for group in self.groups
        )

    def keys(self, policies: tuple[HeadPolicy, ...], salt: str = "") -> PrefixKeys:
        """Keys for a sequence without tokens yet."""
        return PrefixKeys(self._namespace, policies, salt, self.block_size)

    def match(self, keys: PrefixKeys, num_tokens: int) -> PrefixMatch:
        """Which prefix a sequence could share.

        Args:
            keys: Of its full blocks.
            num_tokens: Its length.

        Returns:
            A match that holds until blocks are taken the next time; nothing is found, and nothing
            missed, without prefix caching.

        Raises:
            ValueError: There are fewer keys than the length has full blocks.
        """
        if not self._prefix_caching:
            return PrefixMatch(0, tuple(() for _ in self.groups))
        last_salt = keys.salt
        if keys.first_unsalted is not None:
            last_salt = self._salts.get(keys.first_unsalted, keys.salt)
        return match_prefix(
            keys,
            num_tokens,
            self.pools,
            self.block_size,
            salted_elsewhere=last_salt != keys.salt,
        )

    def begin(
        self,
        policies: tuple[HeadPolicy, ...] | None = None,
        match: PrefixMatch | None = None,
    ) -> SequenceCache:
        """A sequence without tokens, or with a prefix that others computed.

        Args:
            policies: What it keeps of each group; by default the group's own.
            match: What it shares, found for the same policies.

        Raises:
            ValueError: A block of the match is gone, or it was found for other policies; nothing
                was taken.
        """
        policies = self._own_policies if policies is None else policies
        if match is not None:
            self._require_present(match, policies)
        sequence = SequenceCache(
            tuple(BlockTable(*each) for each in zip(policies, self._block_sizes, strict=True))
        )
        if match is not None and match.num_tokens:
            for table, pool, blocks in zip(sequence.tables, self.pools, match.blocks, strict=True):
                pool.share(blocks)
                table.start_with(blocks, match.num_tokens)
            sequence.num_tokens = match.num_tokens
            sequence.num_published = len(match.keys)
            sequence.keys = match.keys
        self._live.add(sequence)
        return sequence

    def _require_present(self, match: PrefixMatch, policies: tuple[HeadPolicy, ...]) -> None:
        for policy, pool, blocks in zip(policies, self.pools, match.blocks, strict=True):
            reachable = policy.reachable_blocks(len(match.keys), self.block_size)
            if len(reachable) != len(blocks):
                raise ValueError("the match was found for other policies")
            for index, block in zip(reachable, blocks, strict=True):
                if not pool.holds(block, match.keys[index]):
                    raise ValueError(f"block {block} of the match is gone")

    def publish(self, sequence: SequenceCache, keys: PrefixKeys) -> None:
        """After a step: let others find the blocks that it filled.

        Args:
            sequence: All its tokens are computed.
            keys: Of all its full blocks, for its policies.

        Raises:
            ValueError: There are fewer keys than full blocks, or they are for other policies; none
                was published.
        """
        self._require_live(sequence)
        if not self._prefix_caching:
            return
        num_full = sequence.num_tokens // self.block_size
        if len(keys.blocks) < num_full:
            raise ValueError(f"{len(keys.blocks)} keys for {num_full} full blocks")
        if keys.policies != sequence.policies:
            raise ValueError(f"keys for {keys.policies}, but the tables have {sequence.policies}")
        sequence.keys = keys.blocks
        if num_full == sequence.num_published:
            return
        if keys.first_unsalted is not None:
            self._salts[keys.first_unsalted] = keys.salt
            self._salts.move_to_end(keys.first_unsalted)
            if len(self._salts) > REMEMBERED_PREFIXES:
                self._salts.popitem(last=False)
        for table, pool in zip(sequence.tables, self.pools, strict=True):
            for logical in range(sequence.num_published, num_full):
                block = table.find(logical)
                if block is not None:
                    pool.publish(block, keys.blocks[logical])
        sequence.num_published = num_full

    def fits(self, num_tokens: int, policies: tuple[HeadPolicy, ...] | None = None) -> bool:
        """Whether a sequence of this length could run if it had the cache to itself."""
        policies = self._own_policies if policies is None else policies
        return all(
            policy.step_blocks(num_tokens, size) <= pool.num_blocks
            for policy, pool, size in zip(policies, self.pools, self._block_sizes, strict=True)
        )

    def has_room(self, wanted: Reservation, held: Iterable[Reservation]) -> bool:
        """Whether a new sequence fits beside others, however far all of them go.

        If so, all can be computed to their lengths, a token of each a step, and none ever lacks a
        block.

        Args:
            wanted: The new one.
            held: Those that run.
        """
        reservations = [wanted, *held]
        return all(
            most_owned(group, pool, size, reservations, self._live) <= pool.num_blocks
            for group, (pool, size) in enumerate(zip(self.pools, self._block_sizes, strict=True))
        )

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
            pool.release(table.take_expired(sequence.num_tokens), passed=True)

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
        child = self.begin(parent.policies)
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
        child.num_published = parent.num_published
        child.keys = parent.keys
        return child, copies

    def free(self, sequence: SequenceCache) -> None:
        """Give back everything the sequence holds; it is not to be used again.

        Raises:
            ValueError: It was freed before.
        """
        self._require_live(sequence)
        self._live.remove(sequence)
        for table, pool in zip(sequence.tables, self.pools, strict=True):
            reachable = table.policy.reachable_blocks(sequence.num_published, self.block_size)
            for index in reachable:
                # Another sequence's block may have had the key, and been evicted meanwhile.
                block = table.find(index)
                if block is not None:
                    pool.publish(block, sequence.keys[index])
            pool.release(table.blocks)
            # The last are evicted first: a prefix without its head is worth nothing. What goes on
            # from the last full block may need a block that the window has left, and any of these
            # may be another sequence's, which used it longer ago.
            pool.touch(sequence.keys[index] for index in reversed(reachable))

    def forget_prefixes(self) -> None:
        """Make every block that nobody owns impossible to find."""
        for pool in self.pools:
            pool.forget()

    def _require_live(self, sequence: SequenceCache) -> None:
        if sequence not in self._live:
            raise ValueError("the sequence was freed before")

    @property
    def owned_blocks(self) -> tuple[int, ...]:
        """Owned blocks of each group."""
        return tuple(pool.num_owned for pool in self.pools)

    @property
    def cached_blocks(self) -> tuple[int, ...]:
        """Blocks of each group that nobody owns and that can be found."""
        return tuple(pool.num_cached for pool in self.pools)

    @property
    def owned_bytes(self) -> int:
        """Bytes of all owned blocks."""
        return sum(
            pool.num_owned * self.layout.block_bytes(group) for group, pool in enumerate(self.pools)
        )

    def full_tokens(self, num_tokens: int) -> int:
        """How many of so many tokens fill blocks."""
        return num_tokens // self.block_size * self.block_size

    def sequence_bytes(self, sequence: SequenceCache, since: int = 0) -> int:
        """Bytes of the blocks that a sequence holds, shared ones included.

        Args:
            sequence: Whose.
            since: Without the blocks of so many first tokens that it never gives back.
        """
        first = since // self.block_size
        return sum(
            (
                len(table.blocks)
                - (first if table.policy.keeps_all else min(first, table.num_sink_blocks))
            )
            * self.layout.block_bytes(group)
            for group, table in enumerate(sequence.tables)
        )

    def check_integrity(self) -> None:
        """Prove that every block is free, cached, or owned by exactly the live tables that list it.

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
