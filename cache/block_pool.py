"""Who owns a group's blocks, and which can be found.

a block is      reference count     it can be found     where it stands
free            0                   no                  in the free queue
owned           1 or more           if it has a key     in that many block tables
cached          0                   yes                 among the passed or the kept, least recently
                                                        used first

Free blocks are handed out first, then cached ones, which are forgotten by that. A block that a
window has left, and that nobody ever found, is *passed*: a long prompt leaves hundreds, and they
must not push out what conversations go on from. The passed are evicted first while they are more
than a quarter of the blocks, and the *kept* otherwise.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable

PASSED_SHARE = 4
"""Passed blocks are evicted first while they are more than one in so many blocks."""

REMEMBERED = 4
"""Keys of evicted blocks that are remembered, as a multiple of the blocks."""

OnForget = Callable[[int, bytes, bool], None]
"""Called with a cached block, its key, and whether it is passed, before it is forgotten."""


class OutOfBlocksError(Exception):
    """The pool has fewer blocks to hand out than were asked for; nothing was taken."""


class BlockPool:
    """Reference counts and keys over the blocks of one head group. Bookkeeping only, no memory.

    Args:
        num_blocks: Blocks of the group; ids are 0 to num_blocks - 1.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        # With the time since when they are.
        self._kept: OrderedDict[int, int] = OrderedDict()
        self._passed: OrderedDict[int, int] = OrderedDict()
        # Blocks that a second sequence has had, a fork included, since they were allocated.
        self._was_found: set[int] = set()
        self._counts = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._found: dict[bytes, int] = {}
        self._evicted: OrderedDict[bytes, None] = OrderedDict()
        self.on_forget: OnForget | None = None

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns, cached ones included: all of them can be handed out."""
        return len(self._free) + self.num_cached

    @property
    def num_cached(self) -> int:
        """Blocks that nobody owns and that can be found."""
        return len(self._kept) + len(self._passed)

    @property
    def num_owned(self) -> int:
        """Blocks that somebody owns, each counted once."""
        return self.num_blocks - self.num_free

    def allocate(self, count: int) -> list[int]:
        """Take blocks without a key; each starts with one owner.

        Raises:
            OutOfBlocksError: Fewer than `count` can be handed out.
        """
        if count > self.num_free:
            raise OutOfBlocksError(f"{count} blocks asked for, {self.num_free} free")
        blocks = self._take(count)
        for block in blocks:
            self._counts[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to blocks that are owned or cached.

        Raises:
            ValueError: A block is free; nothing was changed.
        """
        blocks = list(blocks)
        for block in blocks:
            if self._counts[block] == 0 and self._keys[block] is None:
                raise ValueError(f"block {block} is free and cannot be shared")
        for block in blocks:
            if self._counts[block] == 0:
                self._uncache(block)
                self._note_owned(block)
            self._counts[block] += 1
            self._was_found.add(block)

    def release(self, blocks: Iterable[int], *, passed: bool = False) -> None:
        """Take an owner away; a block without one is cached if it has a key, else free.

        Args:
            blocks: In the order in which they are to be evicted.
            passed: Whether a window has left them, and the sequence goes on.

        Raises:
            ValueError: A block has no owner; nothing was changed.
        """
        blocks = list(blocks)
        for block in blocks:
            if self._counts[block] == 0:
                raise ValueError(f"block {block} is free or cached and cannot be released")
        for block in blocks:
            self._counts[block] -= 1
            if self._counts[block] > 0:
                continue
            if self._keys[block] is None:
                self._was_found.discard(block)
                self._put_back(block)
            else:
                kept = not passed or block in self._was_found
                self._cache(block, kept=kept)
                self._note_unowned(block)

    def is_owned(self, block: int) -> bool:
        """Whether somebody owns a block."""
        return self._counts[block] > 0

    def publish(self, block: int, key: bytes) -> None:
        """Let an owned block be found; if another one has the key, that one is found.

        Raises:
            ValueError: Nobody owns the block.
        """
        if self._counts[block] == 0:
            raise ValueError(f"block {block} has no owner and cannot be published")
        if self._keys[block] is None and key not in self._found:
            self._keys[block] = key
            self._found[key] = block
            self._evicted.pop(key, None)

    def find(self, key: bytes) -> int | None:
        """The block that has a key."""
        return self._found.get(key)

    def holds(self, block: int, key: bytes) -> bool:
        """Whether a block has a key, so that its contents are those of then."""
        return self._keys[block] == key

    def cached(self) -> list[tuple[int, bytes, bool]]:
        """Cached blocks, their keys, and whether they are passed; kept ones and old ones first."""
        return [
            (block, key, queue is self._passed)
            for queue in (self._kept, self._passed)
            for block in queue
            if (key := self._keys[block]) is not None
        ]

    def touch(self, keys: Iterable[bytes]) -> None:
        """Make those blocks of the keys that nobody owns the last ones to be evicted.

        Args:
            keys: In the order in which their blocks are to be evicted.
        """
        for key in keys:
            block = self._found.get(key)
            if block is not None and self._counts[block] == 0:
                self._uncache(block)
                self._cache(block, kept=True)

    def knew(self, key: bytes) -> bool:
        """Whether a block has this key, or had it not long ago."""
        return key in self._found or key in self._evicted

    def forget(self) -> None:
        """Make all cached blocks free."""
        for block in [*self._kept, *self._passed]:
            self._forget(block)
            self._put_free(block)

    def _free_blocks(self) -> Iterable[int]:
        return self._free

    def _lent_blocks(self) -> Collection[int]:
        """All blocks that the group has now."""
        return range(self.num_blocks)

    def _take(self, count: int) -> list[int]:
        """Blocks that nobody owns, free ones first, now without a key; there are as many."""
        return [self._free.popleft() if self._free else self._evict() for _ in range(count)]

    def _put_back(self, block: int) -> None:
        """Make a block free whose last owner has gone."""
        self._free.append(block)

    def _put_free(self, block: int) -> None:
        """Make a block free that was cached."""
        self._free.append(block)

    def _note_owned(self, block: int) -> None:
        """A cached block has an owner."""

    def _note_unowned(self, block: int) -> None:
        """A block whose last owner has gone is cached."""

    def _cache(self, block: int, *, kept: bool) -> None:
        """Put a block without an owner last among the kept, or the passed."""
        (self._kept if kept else self._passed)[block] = 0

    def _uncache(self, block: int) -> None:
        queue = self._passed if block in self._passed else self._kept
        del queue[block]

    @property
    def _too_many_passed(self) -> bool:
        return len(self._passed) * PASSED_SHARE > self.num_blocks

    @property
    def _evicts_passed(self) -> bool:
        """Whether the next block to evict is a passed one."""
        return self._too_many_passed or not self._kept

    def _evict(self) -> int:
        """Forget the cached block that is to go first."""
        block = next(iter(self._passed if self._evicts_passed else self._kept))
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        """Take a cached block's key away; it is in no queue then."""
        key = self._keys[block]
        assert key is not None, "a cached block has a key"
        if self.on_forget is not None:
            self.on_forget(block, key, block in self._passed)
        self._uncache(block)
        self._was_found.discard(block)
        self._keys[block] = None
        del self._found[key]
        self._evicted[key] = None
        if len(self._evicted) > REMEMBERED * self.num_blocks:
            self._evicted.popitem(last=False)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Prove that every block is free, cached, or owned by exactly its holders.

        Args:
            held: The blocks of every table, a shared block once for each.

        Raises:
            AssertionError: A block leaked, is counted wrongly, or is found under a wrong key.
        """
        holders = Counter(held)
        free = Counter(self._free_blocks())
        lent = self._lent_blocks()
        for block in lent:
            count = self._counts[block]
            assert holders[block] == count, (
                f"block {block}: {holders[block]} holders, counted {count}"
            )
            key = self._keys[block]
            assert not (free[block] and block in self._was_found), f"block {block}: free and found"
            places = free[block] + (block in self._kept) + (block in self._passed)
            assert places == (count == 0), f"block {block}: {count} owners, {places} places"
            assert free[block] == (count == 0 and key is None), f"block {block}: free with a key"
            assert key is None or self._found.get(key) == block, f"block {block} is not found"
        assert len(self._found) == sum(key is not None for key in self._keys)
        assert len(self._found) == sum(self._keys[block] is not None for block in lent)
        assert holders.total() == sum(self._counts), "a block is held that is not the group's"
        assert holders.total() == sum(self._counts[block] for block in lent)
        both = self._found.keys() & self._evicted.keys()
        assert not both, f"{len(both)} keys are found and evicted"
