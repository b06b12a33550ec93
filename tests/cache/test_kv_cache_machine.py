"""Random lives of sequences, against a memory that remembers who wrote what."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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
    rule,
)

from headlong.cache.block_pool import OutOfBlocksError
from headlong.cache.groups import HeadGroup
from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.cache.sequence_cache import SequenceCache
from headlong.kernels.layout import PageLayout, build_arena_layout, build_slab_layout
from support.memory import ByteMemory
from support.slots import slot
from support.visibility import reachable


@dataclass(eq=False)
class Life:
    """A sequence and what is true of it."""

    cache: SequenceCache
    # Marker of each token; a child begins with its parent's.
    markers: list[int] = field(default_factory=list)
    # First query that may still run: the first token after the last release.
    first_query: int = 0


class KVCacheMachine(RuleBasedStateMachine):
    lives = Bundle("lives")

    @initialize(
        streaming=st.builds(HeadPolicy, st.integers(0, 10), st.integers(1, 14)),
        sliding=st.builds(HeadPolicy, st.just(0), st.integers(1, 14)),
        block_sizes=st.tuples(*[st.integers(1, 5)] * 3),
        num_blocks=st.tuples(*[st.integers(4, 24)] * 3),
        slabs=st.none() | st.tuples(st.integers(1, 3), st.integers(0, 200), st.integers(3, 20)),
    )
    def start(
        self,
        streaming: HeadPolicy,
        sliding: HeadPolicy,
        block_sizes: tuple[int, int, int],
        num_blocks: tuple[int, int, int],
        slabs: tuple[int, int, int] | None,
    ) -> None:
        self.groups = (
            HeadGroup("retrieval", RETRIEVAL, ((0, 0), (1, 1))),
            HeadGroup("streaming", streaming, ((0, 1),)),
            HeadGroup("sliding", sliding, ((1, 0),)),
        )
        members = tuple(group.members for group in self.groups)
        pages = tuple(PageLayout(size, 2, torch.float32) for size in block_sizes)
        layout = build_arena_layout(members, pages, num_blocks)
        if slabs is not None:
            largest = max(layout.block_bytes(group) for group in range(3))
            # A slab that is twice the largest block holds one wherever it lies.
            size = largest * (slabs[0] + (slabs[1] > 0)) + slabs[1]
            layout = build_slab_layout(members, pages, size, slabs[2])
        # Marker of each slot.
        self.memory = ByteMemory[int](layout)
        self.cache = KVCache(
            self.groups, layout, prefix_caching=False, copy_blocks=self.memory.copy_blocks
        )
        self.live: list[Life] = []
        self.written = 0

    @rule(target=lives)
    def begin(self) -> Life:
        life = Life(self.cache.begin())
        self.live.append(life)
        return life

    @rule(life=lives, num_tokens=st.integers(0, 12))
    def extend(self, life: Life, num_tokens: int) -> None:
        room = self.cache.max_extension(life.cache, num_tokens)
        assert 0 <= room <= num_tokens
        if room < num_tokens:
            # `room` is the most that is possible.
            self._fails_and_takes_nothing(life, room + 1)
        self.cache.extend(life.cache, room)
        for _ in range(room):
            position = len(life.markers)
            life.markers.append(self.written)
            for group, table in enumerate(life.cache.tables):
                self.memory[group, slot(table, position)] = self.written
            self.written += 1

    def _fails_and_takes_nothing(self, life: Life, num_tokens: int) -> None:
        owned = self.cache.owned_blocks
        held = [table.blocks[:] for table in life.cache.tables]
        with pytest.raises(OutOfBlocksError):
            self.cache.extend(life.cache, num_tokens)
        assert self.cache.owned_blocks == owned
        assert [table.blocks for table in life.cache.tables] == held

    @rule(life=lives)
    def release_expired(self, life: Life) -> None:
        self.cache.release_expired(life.cache)
        life.first_query = len(life.markers)

    @rule(target=lives, parent=lives)
    def fork(self, parent: Life) -> Life | MultipleResults[Life]:
        before = self.cache.owned_blocks
        length = len(parent.markers)
        partly = [length % table.block_size > 0 for table in parent.cache.tables]
        try:
            child = self.cache.fork(parent.cache)
        except OutOfBlocksError:
            assert self.cache.owned_blocks == before
            assert not self._holds(partly)
            return multiple()
        assert self._holds([0, 0, 0])
        assert self.cache.owned_blocks == tuple(
            count + own for count, own in zip(before, partly, strict=True)
        )
        life = Life(child, parent.markers.copy(), parent.first_query)
        self.live.append(life)
        return life

    def _holds(self, more: Sequence[int]) -> bool:
        """Whether the arena holds so many more blocks, by the statement of what it holds."""
        layout = self.cache.layout
        owned = [have + own for have, own in zip(self.cache.owned_blocks, more, strict=True)]
        if not layout.slab_bytes:
            return all(count <= most for count, most in zip(owned, layout.num_blocks, strict=True))
        sizes = (layout.slab_blocks(group) for group in range(3))
        needed = sum(-(-count // size) for count, size in zip(owned, sizes, strict=True))
        return needed <= layout.num_slabs

    @rule(life=consumes(lives))
    def free(self, life: Life) -> None:
        self.live.remove(life)
        self.cache.free(life.cache)
        with pytest.raises(ValueError, match="freed before"):
            self.cache.free(life.cache)

    @invariant()
    def integrity(self) -> None:
        self.cache.check_integrity()

    @invariant()
    def every_reachable_token_is_the_one_written(self) -> None:
        for life, group, policy in self._tables():
            table = life.cache.tables[group]
            for position in reachable(policy, life.first_query, len(life.markers)):
                assert self.memory[group, slot(table, position)] == life.markers[position]

    @invariant()
    def owned_is_what_the_policy_says(self) -> None:
        for life, group, policy in self._tables():
            table = life.cache.tables[group]
            length = len(life.markers)
            assert len(table.blocks) == policy.live_blocks(
                life.first_query, length - life.first_query, table.block_size
            )
            if life.first_query == length:
                assert len(table.blocks) <= policy.steady_blocks(length, table.block_size)
        assert self.cache.owned_bytes <= sum(
            self.cache.sequence_bytes(life.cache) for life in self.live
        )

    def _tables(self) -> Iterator[tuple[Life, int, HeadPolicy]]:
        for life in self.live:
            assert life.cache.num_tokens == len(life.markers)
            for group, head_group in enumerate(self.groups):
                yield life, group, head_group.policy

    def teardown(self) -> None:
        for life in self.live:
            self.cache.free(life.cache)
        self.cache.check_integrity()
        assert self.cache.owned_blocks == (0, 0, 0)
        assert self.cache.owned_bytes == 0


KVCacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestKVCache = KVCacheMachine.TestCase
