"""Random lives of sequences that find each other's blocks, against a memory that knows contents.

What lies in a slot is named by all that determines it: the policies and the salt of the sequence
that wrote it, and every token up to its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from headlong.cache.block_copy import BlockCopy
from headlong.cache.block_pool import OutOfBlocksError
from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.cache.prefix_keys import PrefixKeys
from headlong.cache.prefix_match import PrefixMatch
from headlong.cache.sequence_cache import SequenceCache
from support.caches import build_cache, build_slab_cache
from support.memory import ByteMemory
from support.slots import slot
from support.visibility import is_visible, reachable

Content = tuple[tuple[HeadPolicy, ...], str, tuple[int, ...]]

# So few tokens and salts that prefixes meet.
TOKENS = st.lists(st.integers(0, 1), max_size=9)
# Fewer tokens than a prompt may have, so that it can be computed in parts.
CHUNKS = st.integers(1, 14)
KINDS = st.sampled_from([0, 0, 0, 1, 2])
SALTS = st.sampled_from(["", "", "", "a"])


@dataclass(eq=False)
class Asked:
    """A prompt, and what was found for it at some time."""

    keys: PrefixKeys
    tokens: list[int]
    match: PrefixMatch

    def content(self, position: int) -> Content:
        return self.keys.policies, self.keys.salt, tuple(self.tokens[: position + 1])


@dataclass(eq=False)
class Life:
    """A sequence and what is true of it."""

    cache: SequenceCache
    asked: Asked
    # First query that may still run: the first token after the last release.
    first_query: int

    @property
    def tables(self) -> Iterator[tuple[int, HeadPolicy]]:
        return enumerate(self.asked.keys.policies)


class PrefixMachine(RuleBasedStateMachine):
    lives = Bundle("lives")
    stale = Bundle("stale")

    @initialize(
        streaming=st.builds(HeadPolicy, st.integers(0, 5), st.integers(1, 9)),
        sliding=st.builds(HeadPolicy, st.just(0), st.integers(1, 9)),
        kinds=st.sampled_from([(0, 1, 2), (0, 1), (1, 2), (1,), (0,)]),
        block_size=st.integers(1, 4),
        num_blocks=st.tuples(*[st.integers(6, 20)] * 3),
        slabs=st.none() | st.tuples(st.integers(1, 12), st.integers(4, 16)),
    )
    def start(
        self,
        streaming: HeadPolicy,
        sliding: HeadPolicy,
        kinds: tuple[int, ...],
        block_size: int,
        num_blocks: tuple[int, int, int],
        slabs: tuple[int, int] | None,
    ) -> None:
        named = (("retrieval", RETRIEVAL), ("streaming", streaming), ("sliding", sliding))
        policies = dict(named[kind] for kind in kinds)
        if slabs is None:
            self.cache = build_cache(
                policies,
                [num_blocks[kind] for kind in kinds],
                block_size,
                copy_blocks=self._copy_blocks,
            )
        else:
            members = [kind + 1 for kind in kinds]
            # A slab that is twice the largest block holds one wherever it lies.
            pages = 2 * max(members) + slabs[0]
            self.cache = build_slab_cache(
                policies,
                members,
                pages,
                slabs[1],
                block_size,
                copy_blocks=self._copy_blocks,
            )
        # What each slot holds.
        self.memory = ByteMemory[Content](self.cache.layout)
        self.block_size = block_size
        wider = HeadPolicy(streaming.sink_size + 2, streaming.window_size + 3)
        self.policies = [self.cache.policies(each) for each in (None, wider, RETRIEVAL)]
        self.live: list[Life] = []
        # What was asked or computed, so that others can begin alike.
        self.texts: list[list[int]] = [[]]
        # What a block that can be found under a key has to hold.
        self.published: dict[bytes, list[Content]] = {}

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        self.memory.copy_blocks(copies)

    @rule(target=stale, data=st.data(), own=TOKENS, kind=KINDS, salt=SALTS)
    def ask(self, data: st.DataObject, own: list[int], kind: int, salt: str) -> Asked:
        return self._ask(data, own, kind, salt)

    def _ask(self, data: st.DataObject, own: list[int], kind: int, salt: str) -> Asked:
        text = data.draw(st.sampled_from(self.texts))
        tokens = [*text[: data.draw(st.integers(0, len(text)))], *own, 1]
        keys = self.cache.keys(self.policies[kind], salt)
        keys.extend(tokens)
        before = self._bookkeeping()
        asked = Asked(keys, tokens, self.cache.match(keys, len(tokens)))
        assert self._bookkeeping() == before
        self._is_right(asked)
        return asked

    @rule(target=lives, data=st.data(), own=TOKENS, kind=KINDS, salt=SALTS, chunk=CHUNKS)
    def begin(self, data: st.DataObject, own: list[int], kind: int, salt: str, chunk: int) -> Life:
        life = self._begin(self._ask(data, own, kind, salt))
        self.step(life, [], chunk)
        return life

    @rule(target=lives, asked=consumes(stale))
    def begin_with_an_old_match(self, asked: Asked) -> Life | MultipleResults[Life]:
        before = self._bookkeeping()
        if not self._is_there(asked):
            with pytest.raises(ValueError, match="is gone"):
                self.cache.begin(asked.keys.policies, asked.match)
            assert self._bookkeeping() == before
            return multiple()
        self._is_right(asked)
        return self._begin(asked)

    def _extend(self, life: Life, more: list[int], chunk: int) -> None:
        tokens, position = life.asked.tokens, life.cache.num_tokens
        if len(tokens) == position:
            tokens += more
        wanted = min(chunk, len(tokens) - position)
        room = self.cache.max_extension(life.cache, wanted)
        if room < wanted:
            before = self._bookkeeping()
            with pytest.raises(OutOfBlocksError):
                self.cache.extend(life.cache, room + 1)
            assert self._bookkeeping() == before
        self.cache.extend(life.cache, room)
        for written in range(position, position + room):
            for group, table in enumerate(life.cache.tables):
                self.memory[group, slot(table, written)] = life.asked.content(written)

    def _publish(self, life: Life) -> None:
        keys = life.asked.keys
        keys.extend(life.asked.tokens)
        self.cache.publish(life.cache, keys)
        for index in range(life.cache.num_tokens // self.block_size):
            start = index * self.block_size
            self.published[keys.blocks[index]] = [
                life.asked.content(start + offset) for offset in range(self.block_size)
            ]

    def _release_expired(self, life: Life) -> None:
        self.cache.release_expired(life.cache)
        life.first_query = life.cache.num_tokens

    @rule(life=lives, more=TOKENS, chunk=CHUNKS)
    def step(self, life: Life, more: list[int], chunk: int) -> None:
        self._extend(life, more, chunk)
        self._publish(life)
        self._release_expired(life)

    @rule(life=lives, more=TOKENS, chunk=CHUNKS, publish=st.booleans(), release=st.booleans())
    def part_of_a_step(
        self, life: Life, more: list[int], chunk: int, publish: bool, release: bool
    ) -> None:
        self._extend(life, more, chunk)
        if publish:
            self._publish(life)
        if release:
            self._release_expired(life)

    @rule(target=lives, parent=lives)
    def fork(self, parent: Life) -> Life | MultipleResults[Life]:
        before = self._bookkeeping()
        try:
            child = self.cache.fork(parent.cache)
        except OutOfBlocksError:
            assert self._bookkeeping() == before
            # A block of each group at most was asked for.
            assert not self.cache._pools.have([1] * len(self.cache.pools))
            return multiple()
        asked = parent.asked
        tokens = asked.tokens.copy()
        life = Life(child, Asked(asked.keys.copy(), tokens, asked.match), parent.first_query)
        self.live.append(life)
        return life

    @rule(life=consumes(lives), forget=st.sampled_from([False] * 9 + [True]))
    def free(self, life: Life, forget: bool) -> None:
        self.live.remove(life)
        self.texts.append(life.asked.tokens)
        self.cache.free(life.cache)
        if forget:
            self.cache.forget_prefixes()
            assert not any(self.cache.cached_blocks)

    @invariant()
    def integrity(self) -> None:
        self.cache.check_integrity()

    @invariant()
    def all_that_a_query_may_see_is_there_and_right(self) -> None:
        for life in self.live:
            for group, policy in life.tables:
                table = life.cache.tables[group]
                for position in reachable(policy, life.first_query, life.cache.num_tokens):
                    content = self.memory[group, slot(table, position)]
                    assert content == life.asked.content(position)

    @invariant()
    def what_can_be_found_is_right(self) -> None:
        for key, contents in self.published.items():
            for group, pool in enumerate(self.cache.pools):
                block = pool.find(key)
                if block is not None:
                    assert self._contents(group, block) == contents
        for pool in self.cache.pools:
            assert sum(pool.find(key) is not None for key in self.published) >= pool.num_cached

    def _begin(self, asked: Asked) -> Life:
        cache = self.cache.begin(asked.keys.policies, asked.match)
        assert cache.num_tokens == asked.match.num_tokens
        life = Life(cache, asked, cache.num_tokens)
        self.live.append(life)
        self.texts.append(asked.tokens)
        return life

    def _is_right(self, asked: Asked) -> None:
        """The match lists what a query after it may see, with the right contents."""
        match = asked.match
        num_blocks, part = divmod(match.num_tokens, self.block_size)
        assert part == 0
        assert match.num_tokens < len(asked.tokens)
        assert match.num_tokens + sum(match.misses.values()) == len(asked.tokens)
        for group, policy in enumerate(asked.keys.policies):
            visible = {
                key // self.block_size
                for key in range(match.num_tokens)
                if is_visible(policy, match.num_tokens, key)
            }
            for index, block in zip(sorted(visible), match.blocks[group], strict=True):
                assert index < num_blocks
                start = index * self.block_size
                assert self._contents(group, block) == [
                    asked.content(start + offset) for offset in range(self.block_size)
                ]

    def _contents(self, group: int, block: int) -> list[Content | str | None]:
        start = block * self.block_size
        return [self.memory[group, start + offset] for offset in range(self.block_size)]

    def _is_there(self, asked: Asked) -> bool:
        """Whether the blocks of a match are still to be found where it says."""
        for policy, pool, blocks in zip(
            asked.keys.policies, self.cache.pools, asked.match.blocks, strict=True
        ):
            num_blocks = asked.match.num_tokens // self.block_size
            for index, block in zip(
                policy.reachable_blocks(num_blocks, self.block_size), blocks, strict=True
            ):
                if pool.find(asked.keys.blocks[index]) != block:
                    return False
        return True

    def _bookkeeping(self) -> list[object]:
        """All that a refused call has to leave alone, the order of eviction included."""
        return [
            (
                list(pool._free_blocks()),
                list(pool._kept),
                list(pool._passed),
                list(pool._counts),
                list(pool._keys),
            )
            for pool in self.cache.pools
        ]

    def teardown(self) -> None:
        for life in self.live:
            self.cache.free(life.cache)
        self.cache.check_integrity()
        assert not any(self.cache.owned_blocks)
        self.cache.forget_prefixes()
        self.cache.check_integrity()


PrefixMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestPrefixCache = PrefixMachine.TestCase
