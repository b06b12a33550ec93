"""Random lives of sequences over an arena and a tiny host, compared byte by byte with a model.

Every token leaves bytes that name all that determines it: the policies, the salt, and every token
up to its own. Copies are made as late as they may be, in every order.
"""

import hashlib
from dataclasses import dataclass

import pytest
import torch
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
    precondition,
    rule,
)

from headlong.cache.block_pool import OutOfBlocksError
from headlong.cache.block_tiers import BlockTiers
from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.cache.prefix_keys import PrefixKeys
from headlong.cache.prefix_match import ELSEWHERE, PrefixMatch
from headlong.cache.sequence_cache import SequenceCache
from support.caches import build_tiered_cache
from support.lazy_mover import LazyMover
from support.visibility import is_visible, reachable

TOKENS = st.lists(st.integers(0, 1), max_size=9)
CHUNKS = st.integers(1, 14)
SALTS = st.sampled_from(["", "", "", "a"])
TOKEN_BYTES = 8


@dataclass(eq=False)
class Asked:
    keys: PrefixKeys
    tokens: list[int]
    match: PrefixMatch

    def content(self, position: int) -> bytes:
        named = repr((self.keys.policies, self.keys.salt, self.tokens[: position + 1]))
        return hashlib.sha256(named.encode()).digest()[:TOKEN_BYTES]


@dataclass(eq=False)
class Life:
    cache: SequenceCache
    asked: Asked
    # First query that may still run: the first token after the last release.
    first_query: int


class TieredMachine(RuleBasedStateMachine):
    lives = Bundle("lives")
    stale = Bundle("stale")

    @initialize(
        streaming=st.builds(HeadPolicy, st.integers(0, 5), st.integers(1, 9)),
        kinds=st.sampled_from([(0, 1), (0, 1), (1,), (0,)]),
        block_size=st.integers(1, 4),
        num_blocks=st.tuples(*[st.integers(6, 14)] * 2),
        num_slots=st.integers(4, 40),
        slab_pages=st.sampled_from([0, 2, 3]),
    )
    def start(
        self,
        streaming: HeadPolicy,
        kinds: tuple[int, ...],
        block_size: int,
        num_blocks: tuple[int, int],
        num_slots: int,
        slab_pages: int,
    ) -> None:
        named = (("retrieval", RETRIEVAL), ("streaming", streaming))
        self.cache, self.arena = build_tiered_cache(
            dict(named[kind] for kind in kinds),
            [num_blocks[kind] for kind in kinds],
            block_size,
            slab_pages=slab_pages,
        )
        layout = self.cache.layout
        self.host = torch.zeros(num_slots * layout.block_bytes(0), dtype=torch.uint8)
        self.mover = LazyMover(self.arena, layout, self.host)
        self.tiers = BlockTiers(layout, self.host, self.mover)
        self.cache.attach(self.tiers)
        self.block_size = block_size
        wider = HeadPolicy(streaming.sink_size + 2, streaming.window_size + 3)
        self.policies = [self.cache.policies(each) for each in (None, wider)]
        self.live: list[Life] = []
        self.texts: list[list[int]] = [[]]
        self.published: dict[bytes, bytes] = {}

    @rule(target=stale, data=st.data(), own=TOKENS, kind=st.integers(0, 1), salt=SALTS)
    def ask(self, data: st.DataObject, own: list[int], kind: int, salt: str) -> Asked:
        return self._ask(data, own, kind, salt)

    def _ask(self, data: st.DataObject, own: list[int], kind: int, salt: str) -> Asked:
        text = data.draw(st.sampled_from(self.texts))
        tokens = [*text[: data.draw(st.integers(0, len(text)))], *own, 1]
        keys = self.cache.keys(self.policies[kind], salt)
        keys.extend(tokens)
        asked = Asked(keys, tokens, self.cache.match(keys, len(tokens)))
        in_arena = self.cache.match_arena(keys, len(tokens))
        assert in_arena.num_tokens <= asked.match.num_tokens
        self._is_right(asked)
        return asked

    @rule(target=lives, data=st.data(), own=TOKENS, kind=st.integers(0, 1), salt=SALTS)
    def begin(
        self, data: st.DataObject, own: list[int], kind: int, salt: str
    ) -> Life | MultipleResults[Life]:
        return self._begin(self._ask(data, own, kind, salt))

    @rule(target=lives, asked=consumes(stale))
    def begin_with_an_old_match(self, asked: Asked) -> Life | MultipleResults[Life]:
        if not self._is_there(asked):
            before = self._owned()
            with pytest.raises(ValueError, match="is gone"):
                self.cache.begin(asked.keys.policies, asked.match)
            assert self._owned() == before
            return multiple()
        return self._begin(asked)

    def _begin(self, asked: Asked) -> Life | MultipleResults[Life]:
        before = self._owned()
        try:
            cache = self.cache.begin(asked.keys.policies, asked.match)
        except OutOfBlocksError:
            assert self._owned() == before
            assert any(ELSEWHERE in blocks for blocks in asked.match.blocks)
            return multiple()
        assert cache.num_tokens == asked.match.num_tokens
        loads = any(ELSEWHERE in blocks for blocks in asked.match.blocks)
        assert not loads or not self.cache.is_ready(cache)
        life = Life(cache, asked, cache.num_tokens)
        self.live.append(life)
        self.texts.append(asked.tokens)
        return life

    @rule(life=lives, more=TOKENS, chunk=CHUNKS)
    def step(self, life: Life, more: list[int], chunk: int) -> None:
        if not self.cache.is_ready(life.cache):
            return
        tokens, position = life.asked.tokens, life.cache.num_tokens
        if len(tokens) == position:
            tokens += more
        wanted = min(chunk, len(tokens) - position)
        room = self.cache.max_extension(life.cache, wanted)
        self.cache.extend(life.cache, room)
        for written in range(position, position + room):
            for group, table in enumerate(life.cache.tables):
                block = table.find(written // self.block_size)
                assert block is not None
                self._token(group, block, written % self.block_size)[:] = self._bytes(
                    life.asked.content(written)
                )
        keys = life.asked.keys
        keys.extend(life.asked.tokens)
        self.cache.publish(life.cache, keys)
        for index in range(life.cache.num_tokens // self.block_size):
            self.published[keys.blocks[index]] = self._block_content(life.asked, index)
        self.cache.release_expired(life.cache)
        life.first_query = life.cache.num_tokens

    @rule(target=lives, parent=lives)
    def fork(self, parent: Life) -> Life | MultipleResults[Life]:
        if not self.cache.is_ready(parent.cache):
            return multiple()
        try:
            child = self.cache.fork(parent.cache)
        except OutOfBlocksError:
            return multiple()
        asked = parent.asked
        life = Life(
            child, Asked(asked.keys.copy(), asked.tokens.copy(), asked.match), parent.first_query
        )
        self.live.append(life)
        return life

    @rule(life=consumes(lives), forget=st.sampled_from([False] * 12 + [True]))
    def free(self, life: Life, forget: bool) -> None:
        self.live.remove(life)
        self.texts.append(life.asked.tokens)
        self.cache.free(life.cache)
        if forget:
            self.cache.forget_prefixes()
            assert not any(self.cache.cached_blocks)
            assert self.tiers.host.held_bytes == 0

    @rule(loads=st.booleans(), settle=st.booleans())
    def deliver(self, loads: bool, settle: bool) -> None:
        if loads:
            self.mover.deliver_load()
        else:
            self.mover.deliver_store()
        if settle:
            self.cache.settle()

    @precondition(lambda self: not self.live)
    @rule()
    def idle(self) -> None:
        while self.cache.copy_ahead():
            pass
        assert not self.tiers.busy
        assert self.cache.owned_blocks == (0,) * len(self.cache.pools)

    @invariant()
    def integrity(self) -> None:
        self.cache.check_integrity()

    @invariant()
    def all_that_a_query_may_see_is_there_and_right(self) -> None:
        for life in self.live:
            if not self.cache.is_ready(life.cache):
                continue
            for group, policy in enumerate(life.asked.keys.policies):
                table = life.cache.tables[group]
                for position in reachable(policy, life.first_query, life.cache.num_tokens):
                    block = table.find(position // self.block_size)
                    assert block is not None
                    found = self._token(group, block, position % self.block_size)
                    assert bytes(found.tolist()) == life.asked.content(position)

    @invariant()
    def what_can_be_found_is_right(self) -> None:
        for key, content in self.published.items():
            for group, pool in enumerate(self.cache.pools):
                block = pool.find(key)
                if block is not None and not self.tiers.is_loading(group, block):
                    assert self._arena_content(group, block) == content
                slot = self.tiers.host.find(group, key)
                if slot is not None and slot.pins == 0:
                    assert self._host_content(group, slot.offset) == content

    def _is_right(self, asked: Asked) -> None:
        match = asked.match
        assert match.num_tokens % self.block_size == 0
        assert match.num_tokens < len(asked.tokens)
        assert match.num_tokens + sum(match.misses.values()) == len(asked.tokens)
        for group, policy in enumerate(asked.keys.policies):
            visible = {
                key // self.block_size
                for key in range(match.num_tokens)
                if is_visible(policy, match.num_tokens, key)
            }
            assert len(visible) == len(match.blocks[group])
            for index, block in zip(sorted(visible), match.blocks[group], strict=True):
                key = asked.keys.blocks[index]
                assert self.published[key] == self._block_content(asked, index)
                if block == ELSEWHERE:
                    assert self.tiers.host.has(group, key)
                else:
                    assert self.cache.pools[group].find(key) == block

    def _is_there(self, asked: Asked) -> bool:
        for group, (policy, blocks) in enumerate(
            zip(asked.keys.policies, asked.match.blocks, strict=True)
        ):
            reached = policy.reachable_blocks(len(asked.match.keys), self.block_size)
            for index, block in zip(reached, blocks, strict=True):
                key = asked.keys.blocks[index]
                if block == ELSEWHERE:
                    if not self.tiers.host.has(group, key):
                        return False
                elif self.cache.pools[group].find(key) != block:
                    return False
        return True

    def _owned(self) -> tuple[list[int], ...]:
        return tuple(list(pool._counts) for pool in self.cache.pools)

    def _bytes(self, content: bytes) -> torch.Tensor:
        return torch.tensor(list(content), dtype=torch.uint8)

    def _block_content(self, asked: Asked, index: int) -> bytes:
        start = index * self.block_size
        return b"".join(asked.content(start + each) for each in range(self.block_size))

    def _token(self, group: int, block: int, offset: int) -> torch.Tensor:
        page = self.cache.layout.view_group(self.arena, group)[block][0]
        return page[offset * TOKEN_BYTES : (offset + 1) * TOKEN_BYTES]

    def _arena_content(self, group: int, block: int) -> bytes:
        page = self.cache.layout.view_group(self.arena, group)[block][0]
        return bytes(page[: self.block_size * TOKEN_BYTES].tolist())

    def _host_content(self, group: int, offset: int) -> bytes:
        return bytes(self.host[offset : offset + self.block_size * TOKEN_BYTES].tolist())

    def teardown(self) -> None:
        for life in self.live:
            self.cache.free(life.cache)
        self.live.clear()
        self.idle()
        self.cache.check_integrity()


TieredMachine.TestCase.settings = settings(max_examples=70, stateful_step_count=40, deadline=None)
TestTieredCache = TieredMachine.TestCase
