"""A cache whose blocks are found beyond the arena too.

A prefix may be held in part by the host. A sequence that begins with it gets blocks of the arena
for that part at once, which others can find and share, and it waits until they have their contents.
Until then each of these blocks has one more owner, so that nobody writes where they arrive.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from headlong.cache.block_copy import BlockCopy
from headlong.cache.block_pool import OutOfBlocksError
from headlong.cache.block_tiers import BlockTiers, Fetch
from headlong.cache.groups import HeadGroup
from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import HeadPolicy
from headlong.cache.prefix_keys import PrefixKeys
from headlong.cache.prefix_match import ELSEWHERE, PrefixMatch
from headlong.cache.sequence_cache import SequenceCache
from headlong.cache.tiered_lookup import DiskPlan, HeldBlocks, StoredBlocks
from headlong.kernels.layout import ArenaLayout

AHEAD_BLOCKS = 64
"""Most blocks that an idle engine copies to the host before it looks whether it is still idle."""

WAIT_S = 0.02
"""A wait for what is on its way takes no longer, so that its caller sees what else there is."""


class TieredCache(KVCache):
    """A `KVCache` with tiers; until they are attached it is like any other.

    Args:
        groups: As those of `KVCache`, like all that follow.
        layout: The arena's map for these groups.
        prefix_caching: Whether blocks can be found by other sequences.
        namespace: What determines K and V beside tokens and policies.
        copy_blocks: Makes copies, in their order, before it returns.
        wide_tokens: As that of `Room`.

    Attributes:
        tiers: What holds blocks beyond the arena, or None.
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
        super().__init__(
            groups,
            layout,
            prefix_caching=prefix_caching,
            namespace=namespace,
            copy_blocks=copy_blocks,
            wide_tokens=wide_tokens,
        )
        self.tiers: BlockTiers | None = None
        # Blocks that are owned, by group, and that no table lists yet.
        self._untabled: tuple[list[list[int]], ...] = ()
        # Blocks that sequences wait for, until they have their contents.
        self._waiting: dict[SequenceCache, set[tuple[int, int]]] = {}
        # What an idle engine may still copy; None if the pools have changed since it was listed.
        self._ahead: deque[tuple[int, int, bytes, bool]] | None = None
        # Whether anything has arrived that the caller of `settle` does not know of.
        self._unnoted = False

    def attach(self, tiers: BlockTiers | None) -> None:
        """From now on keep what the arena has no room for, or no longer."""
        self.tiers = tiers
        for group, pool in enumerate(self.pools):
            pool.on_forget = None if tiers is None else partial(tiers.keep, group)

    def match(self, keys: PrefixKeys, num_tokens: int) -> PrefixMatch:
        """As `KVCache.match`, with what the host holds."""
        if self.tiers is None:
            return super().match(keys, num_tokens)
        return self._match(keys, num_tokens, self._lookups(HeldBlocks, self.tiers))

    def match_arena(self, keys: PrefixKeys, num_tokens: int) -> PrefixMatch:
        """As `KVCache.match`: only what needs no loading."""
        return super().match(keys, num_tokens)

    def load_bytes(self, match: PrefixMatch) -> int:
        """Bytes of a match that would have to be loaded."""
        return sum(
            blocks.count(ELSEWHERE) * self.layout.block_bytes(group)
            for group, blocks in enumerate(match.blocks)
        )

    def plan_fetch(self, keys: PrefixKeys, num_tokens: int) -> DiskPlan | None:
        """See what of a prefix is on disk alone, as much as half of the host has room for.

        Args:
            keys: Of its full blocks.
            num_tokens: Its length.

        Returns:
            None if nothing is to be read.
        """
        tiers = self.tiers
        if tiers is None or tiers.disk is None:
            return None
        while num_tokens > self.block_size:
            match = self._match(keys, num_tokens, self._lookups(StoredBlocks, tiers))
            elsewhere = [
                (group, match.keys[index])
                for group, index, block in match.places(keys.policies, self.block_size)
                if block == ELSEWHERE
            ]
            names = tuple(name for name in elsewhere if not tiers.host.has(*name))
            num_bytes = sum(self.layout.block_bytes(group) for group, _ in names)
            if not names:
                return None
            if num_bytes <= tiers.host.num_bytes // 2:
                held = tuple(name for name in elsewhere if tiers.host.has(*name))
                return DiskPlan(match.num_tokens, names, held, num_bytes)
            num_tokens = match.num_tokens // 2
        return None

    def fetch(self, plan: DiskPlan) -> Fetch:
        """Begin to read from disk what was planned."""
        assert self.tiers is not None
        # What is read must push out other blocks than those that it belongs to.
        for name in plan.held:
            slot = self.tiers.host.find(*name)
            if slot is not None:
                self.tiers.host.touch(slot)
        return self.tiers.fetch(plan.names)

    def _lookups(self, kind: type[HeldBlocks], tiers: BlockTiers) -> list[HeldBlocks]:
        return [kind(group, pool, tiers) for group, pool in enumerate(self.pools)]

    def begin(
        self,
        policies: tuple[HeadPolicy, ...] | None = None,
        match: PrefixMatch | None = None,
    ) -> SequenceCache:
        """As `KVCache.begin`; what the host holds of a match is loaded, see `is_ready`.

        Raises:
            ValueError: As there.
            OutOfBlocksError: There are too few blocks for what would be loaded; nothing was taken.
        """
        self._ahead = None
        sequence = super().begin(policies, match)
        if self.tiers is not None and match is not None:
            missing = {
                (group, block)
                for group, table in enumerate(sequence.tables)
                for block in table.blocks
                if self.tiers.is_loading(group, block)
            }
            if missing:
                self._waiting[sequence] = missing
        return sequence

    def is_ready(self, sequence: SequenceCache) -> bool:
        """Whether all blocks of a sequence have their contents."""
        return self.tiers is None or sequence not in self._waiting

    @property
    def loads(self) -> bool:
        """Whether blocks are on their way to the arena."""
        return self.tiers is not None and self.tiers.num_loading > 0

    def settle(self) -> bool:
        """Take note of what arrived.

        Returns:
            Whether anything did that somebody may wait for.
        """
        if self.tiers is not None:
            self._settle(self.tiers)
        unnoted, self._unnoted = self._unnoted, False
        return unnoted

    def _settle(self, tiers: BlockTiers) -> None:
        num_reading = tiers.num_reading
        arrived = tiers.settle()
        for group, block in arrived:
            self.pools[group].release([block])
        if arrived:
            done = set(arrived)
            left = {sequence: missing - done for sequence, missing in self._waiting.items()}
            self._waiting = {sequence: missing for sequence, missing in left.items() if missing}
        if arrived or tiers.num_reading != num_reading:
            self._unnoted = True

    def wait(self) -> None:
        """Wait a little for what is on its way."""
        if self.tiers is not None:
            self.tiers.wait(WAIT_S)

    def copy_ahead(self) -> bool:
        """Copy some blocks that can be found to the host, while nothing else is to be done.

        Returns:
            Whether there is more to do, or to wait for.
        """
        tiers = self.tiers
        if tiers is None:
            return False
        if self._ahead is None:
            self._ahead = deque(
                (group, *each) for group, pool in enumerate(self.pools) for each in pool.cached()
            )
        begun = 0
        while self._ahead and begun < AHEAD_BLOCKS:
            begun += tiers.keep_ahead(*self._ahead.popleft())
        tiers.flush()
        if tiers.busy:
            tiers.wait(WAIT_S)
            self._settle(tiers)
        return bool(self._ahead) or tiers.busy

    def _holds(self, group: int, block: int, key: bytes) -> bool:
        if block == ELSEWHERE:
            return self.tiers is not None and self.tiers.host.has(group, key)
        return super()._holds(group, block, key)

    def _share(
        self, match: PrefixMatch, policies: tuple[HeadPolicy, ...]
    ) -> Sequence[Sequence[int]]:
        tiers = self.tiers
        if tiers is None or not self.load_bytes(match):
            return super()._share(match, policies)
        missing: list[list[bytes]] = [[] for _ in self.pools]
        for group, index, block in match.places(policies, self.block_size):
            if block == ELSEWHERE:
                missing[group].append(match.keys[index])
        # What is evicted below must push nothing out of the host that is to be loaded.
        slots = tiers.claim((group, key) for group, keys in enumerate(missing) for key in keys)
        try:
            present, taken = self._take_over(match, missing)
        except OutOfBlocksError:
            tiers.disclaim(slots)
            raise
        tiers.load(slots, [block for blocks in taken for block in blocks])
        there, filled = [list(map(iter, each)) for each in (present, taken)]
        return [
            [next((filled if block == ELSEWHERE else there)[group]) for block in blocks]
            for group, blocks in enumerate(match.blocks)
        ]

    def _take_over(
        self, match: PrefixMatch, missing: Sequence[Sequence[bytes]]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Share what the arena has of a match, and take blocks for the keys that it misses.

        Returns:
            Both, by group. Blocks that the arena has may lie elsewhere than the match says, if
            they had to make way.
        """
        present = [[each for each in blocks if each != ELSEWHERE] for blocks in match.blocks]
        for pool, blocks in zip(self.pools, present, strict=True):
            pool.share(blocks)
        taken: list[list[int]] = []
        self._untabled = (present, taken)
        try:
            for pool, keys in zip(self.pools, missing, strict=True):
                taken.append(pool.allocate(len(keys)))
        except OutOfBlocksError:
            for pool, blocks in zip(self.pools, taken, strict=False):
                pool.release(blocks)
            for pool, blocks in zip(self.pools, present, strict=True):
                pool.release(reversed(blocks))
            raise
        finally:
            self._untabled = ()
        for pool, blocks, keys in zip(self.pools, taken, missing, strict=True):
            # The second owner is the copy.
            pool.share(blocks)
            for block, key in zip(blocks, keys, strict=True):
                pool.publish(block, key)
        return present, taken

    def settle_blocks(self) -> bool:
        """As `KVCache.settle_blocks`: all that is being loaded arrives."""
        tiers = self.tiers
        if tiers is None or not tiers.num_loading:
            return False
        while tiers.num_loading:
            tiers.wait(WAIT_S)
            self._settle(tiers)
        return True

    def move_blocks(self, group: int, places: Mapping[int, int]) -> None:
        """As `KVCache.move_blocks`."""
        for blocks in self._untabled:
            if group < len(blocks):
                blocks[group] = [places.get(block, block) for block in blocks[group]]
        super().move_blocks(group, places)

    def extend(self, sequence: SequenceCache, num_tokens: int) -> None:
        """As `KVCache.extend`."""
        super().extend(sequence, num_tokens)
        self._note_change()

    def _copy(self, copies: Sequence[BlockCopy]) -> None:
        """As `KVCache._copy`, once what the new places held is kept."""
        if self.tiers is not None:
            self.tiers.fence()
        super()._copy(copies)

    def fork(self, parent: SequenceCache) -> SequenceCache:
        """As `KVCache.fork`, of a sequence that is ready."""
        assert self.is_ready(parent), "what has not arrived cannot be copied"
        child = super().fork(parent)
        self._note_change()
        return child

    def free(self, sequence: SequenceCache) -> None:
        """As `KVCache.free`; what is still being loaded arrives, and can be found."""
        super().free(sequence)
        self._waiting.pop(sequence, None)
        self._note_change()

    def _note_change(self) -> None:
        """Blocks were handed out or given back: the caller's next step may write the former."""
        self._ahead = None
        if self.tiers is not None:
            self.tiers.fence()

    def forget_prefixes(self) -> None:
        """As `KVCache.forget_prefixes`, in all tiers."""
        tiers = self.tiers
        if tiers is None:
            super().forget_prefixes()
            return
        self.attach(None)
        super().forget_prefixes()
        tiers.drop_writes()
        while tiers.busy:
            tiers.wait(WAIT_S)
            self._settle(tiers)
        super().forget_prefixes()
        tiers.forget()
        self.attach(tiers)

    def _held_besides(self, group: int) -> Iterable[int]:
        return () if self.tiers is None else self.tiers.loading(group)

    def check_integrity(self) -> None:
        """As `KVCache.check_integrity`, with what is on its way.

        Raises:
            AssertionError: As there, or the tiers lost something.
        """
        super().check_integrity()
        if self.tiers is None:
            return
        self.tiers.check_integrity()
        for sequence, missing in self._waiting.items():
            assert sequence in self._live, "a sequence that was freed waits for blocks"
            assert missing, "a sequence waits for nothing"
            assert all(self.tiers.is_loading(*each) for each in missing)
