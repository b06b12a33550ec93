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

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

from headlong.cache.block_copy import BlockCopy
from headlong.cache.block_pool import OutOfBlocksError
from headlong.cache.block_table import BlockTable
from headlong.cache.groups import STREAMING, HeadGroup
from headlong.cache.policy import HeadPolicy
from headlong.cache.pools import Pools
from headlong.cache.prefix_keys import PrefixKeys
from headlong.cache.prefix_match import Lookup, PrefixMatch, match_prefix
from headlong.cache.reservation import Reservation
from headlong.cache.room import Room
from headlong.cache.salts import Salts
from headlong.cache.sequence_cache import Places, SequenceCache
from headlong.kernels.layout import ArenaLayout


class KVCache:
    """Bookkeeping of the arena's blocks. Holds no memory: `cache.arena.Arena` does.

    Args:
        groups: The model's head groups.
        layout: The arena's map for these groups.
        prefix_caching: Whether blocks can be found by other sequences.
        namespace: What determines K and V beside tokens and policies.
        copy_blocks: Makes copies, in their order, before what is asked of the arena next. A fork
            needs them, and where groups share the arena, blocks may have to make way for those of
            another group.
        wide_tokens: As that of `Room`.

    Raises:
        ValueError: With prefix caching, groups differ in their block size; or groups share the
            arena, and nothing makes copies.
    """

    def __init__(
        self,
        groups: Sequence[HeadGroup],
        layout: ArenaLayout,
        *,
        prefix_caching: bool = True,
        namespace: bytes = b"",
        copy_blocks: Callable[[Sequence[BlockCopy]], None] | None = None,
        wide_tokens: int = 0,
    ) -> None:
        self.groups = tuple(groups)
        self.layout = layout
        self._block_sizes = tuple(page.block_size for page in layout.pages)
        if prefix_caching and len(set(self._block_sizes)) > 1:
            raise ValueError(f"a prefix cache needs one block size, got {self._block_sizes}")
        self.block_size = self._block_sizes[0]
        if layout.slab_bytes and copy_blocks is None:
            raise ValueError("groups that share an arena need copy_blocks, got None")
        self._pools = Pools(layout, self)
        self.pools = self._pools.groups
        self._copy_blocks = copy_blocks
        self._room = Room(self.groups, self._block_sizes, self._pools, wide_tokens)
        self._own_policies = tuple(group.policy for group in self.groups)
        self._prefix_caching = prefix_caching
        self._namespace = namespace
        self._live: set[SequenceCache] = set()
        self._places = Places()
        self._salts = Salts()

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

    def keys(
        self,
        policies: tuple[HeadPolicy, ...],
        salt: str = "",
        dense_tokens: int | None = None,
    ) -> PrefixKeys:
        """Keys for a sequence without tokens yet; the arguments are those of `PrefixKeys`."""
        return PrefixKeys(self._namespace, policies, salt, self.block_size, dense_tokens)

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
        return self._match(keys, num_tokens, self.pools)

    def _match(self, keys: PrefixKeys, num_tokens: int, places: Sequence[Lookup]) -> PrefixMatch:
        if not self._prefix_caching:
            return PrefixMatch(0, tuple(() for _ in self.groups))
        return match_prefix(
            keys,
            num_tokens,
            places,
            self.block_size,
            salted_elsewhere=self._salts.is_other(keys),
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
            for group, index, block in match.places(policies, self.block_size):
                if not self._holds(group, block, match.keys[index]):
                    raise ValueError(f"block {block} of the match is gone")
        shared = None if match is None else self._share(match, policies)
        sequence = SequenceCache(
            tuple(BlockTable(*each) for each in zip(policies, self._block_sizes, strict=True)),
            self._places.take(),
        )
        if match is not None and shared is not None and match.num_tokens:
            for table, blocks in zip(sequence.tables, shared, strict=True):
                table.start_with(blocks, match.num_tokens)
            sequence.num_tokens = match.num_tokens
            sequence.num_published = len(match.keys)
            sequence.keys = match.keys
        self._live.add(sequence)
        return sequence

    def _holds(self, group: int, block: int, key: bytes) -> bool:
        """Whether a block of a match is still there."""
        return self.pools[group].holds(block, key)

    def _share(
        self, match: PrefixMatch, policies: tuple[HeadPolicy, ...]
    ) -> Sequence[Sequence[int]]:
        """Become an owner of a match's blocks; all or none."""
        for pool, blocks in zip(self.pools, match.blocks, strict=True):
            pool.share(blocks)
        return match.blocks

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
        self._salts.note(keys)
        for table, pool in zip(sequence.tables, self.pools, strict=True):
            for logical in range(sequence.num_published, num_full):
                block = table.find(logical)
                if block is not None:
                    pool.publish(block, keys.blocks[logical])
        sequence.num_published = num_full

    def fits(self, num_tokens: int, policies: tuple[HeadPolicy, ...] | None = None) -> bool:
        """Whether a sequence of this length could run if it had the cache to itself."""
        policies = self._own_policies if policies is None else policies
        return self._room.fits(num_tokens, policies)

    def has_room(self, wanted: Reservation, held: Iterable[Reservation]) -> bool:
        """Whether a new sequence fits beside others, however far all of them go.

        If so, all can be computed to their lengths, a token of each a step, and none ever lacks a
        block.

        Args:
            wanted: The new one.
            held: Those that run.
        """
        return self._room.has_room([wanted, *held], self._live)

    def max_extension(self, sequence: SequenceCache, num_tokens: int) -> int:
        """How many of `num_tokens` more tokens fit into what the sequence has and what is free."""
        return self._room.max_extension(sequence, num_tokens)

    def extend(self, sequence: SequenceCache, num_tokens: int) -> None:
        """Give the sequence blocks for `num_tokens` more tokens in every group.

        Raises:
            OutOfBlocksError: A group has too few free blocks; nothing was taken.
            ValueError: The sequence was freed before.
        """
        self._require_live(sequence)
        missing = sequence.missing_blocks(num_tokens)
        if not self._pools.have(missing):
            raise OutOfBlocksError(self._pools.explain(missing, self.groups))
        for count, table, pool in zip(missing, sequence.tables, self.pools, strict=True):
            table.add(pool.allocate(count))
        sequence.num_tokens += num_tokens

    def release_expired(self, sequence: SequenceCache) -> None:
        """Give back what no later query of the sequence can see."""
        self._require_live(sequence)
        for table, pool in zip(sequence.tables, self.pools, strict=True):
            pool.release(table.take_expired(sequence.num_tokens), passed=True)

    def fork(self, parent: SequenceCache) -> SequenceCache:
        """A second sequence with the parent's tokens.

        Full blocks are shared. A block that is only partly filled is copied, because both will
        write into it.

        Raises:
            OutOfBlocksError: No free block for a copy; nothing was taken.
        """
        self._require_live(parent)
        partial = [
            len(table.blocks) > 0 and parent.num_tokens % table.block_size > 0
            for table in parent.tables
        ]
        if not self._pools.have(partial):
            raise OutOfBlocksError("no free block for the copy of a partly filled one")
        child = self.begin(parent.policies)
        for group, (source, target) in enumerate(zip(parent.tables, child.tables, strict=True)):
            target.window_start = source.window_start
            shared = source.blocks[:-1] if partial[group] else source.blocks[:]
            self.pools[group].share(shared)
            target.add(shared.tolist())
            if partial[group]:
                target.add(self.pools[group].allocate(1))
        # What was taken for one group may have moved the blocks of another: only now they stay.
        self._copy(
            [
                BlockCopy(group, parent.tables[group].blocks[-1], child.tables[group].blocks[-1])
                for group, is_copied in enumerate(partial)
                if is_copied
            ]
        )
        child.num_tokens = parent.num_tokens
        child.num_published = parent.num_published
        child.keys = parent.keys
        return child

    def free(self, sequence: SequenceCache) -> None:
        """Give back everything the sequence holds; it is not to be used again.

        Raises:
            ValueError: It was freed before.
        """
        self._require_live(sequence)
        self._live.remove(sequence)
        self._places.give_back(sequence.place)
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

    def settle_blocks(self) -> bool:
        """As `BlockMover.settle_blocks`: here nothing is on its way."""
        return False

    def move_blocks(self, group: int, places: Mapping[int, int]) -> None:
        """As `BlockMover.move_blocks`."""
        for sequence in self._live:
            sequence.tables[group].relocate(places)
        self._copy([BlockCopy(group, *each) for each in places.items()])

    def _copy(self, copies: Sequence[BlockCopy]) -> None:
        if copies:
            assert self._copy_blocks is not None, "a cache that copies was made without copy_blocks"
            self._copy_blocks(copies)

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
    def free_blocks(self) -> tuple[int, ...]:
        """Blocks that each group could take if the others took none, its cached ones left out."""
        return self._pools.free_blocks

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
            table.num_blocks_after(first) * self.layout.block_bytes(group)
            for group, table in enumerate(sequence.tables)
        )

    def _held_besides(self, group: int) -> Iterable[int]:
        """Blocks of a group that are held by no sequence, once for each holder."""
        return ()

    def check_integrity(self) -> None:
        """Prove that every block is free, cached, or owned by exactly the live tables that list it.

        Raises:
            AssertionError: A block leaked, or a table lacks blocks for its tokens.
        """
        self._pools.check_integrity(
            chain(_held(self._live, group), self._held_besides(group))
            for group in range(len(self.groups))
        )
        for sequence in self._live:
            for table in sequence.tables:
                assert table.missing_blocks(sequence.num_tokens) == 0
        places = {sequence.place for sequence in self._live}
        assert len(places) == len(self._live), "two sequences have one place"


def _held(sequences: Iterable[SequenceCache], group: int) -> Iterable[int]:
    for sequence in sequences:
        yield from sequence.tables[group].blocks
