"""Groups that share an arena: who gets a slab, and that no memory is stranded."""

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headlong.cache.block_copy import BlockCopy
from headlong.cache.block_pool import OutOfBlocksError
from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.cache.prefix_keys import PrefixKeys
from headlong.cache.reservation import Reservation
from headlong.cache.sequence_cache import SequenceCache
from headlong.cache.slab_size import choose_slab_bytes, straddled
from headlong.kernels.layout import PageLayout, blocks_in_slab, build_slab_layout
from support.caches import build_slab_cache
from support.memory import ByteMemory

STREAMING = HeadPolicy(sink_size=3, window_size=6)
NAMED = {"retrieval": RETRIEVAL, "streaming": STREAMING}


def build(num_slabs: int, members: Sequence[int] = (1, 1), slab_pages: int = 4) -> KVCache:
    """By default a slab is four blocks of either group."""
    return build_slab_cache(NAMED, members, slab_pages, num_slabs)


def keyed(cache: KVCache, group: int, *keys: bytes) -> list[int]:
    """Blocks of a group that nobody owns and that can be found, the first the oldest."""
    pool = cache.pools[group]
    blocks = pool.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    pool.release(blocks)
    return blocks


def names(prefix: str, count: int) -> list[bytes]:
    return [f"{prefix}{index}".encode() for index in range(count)]


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_slab_lends_as_many_blocks_wherever_it_lies(slab: int, block: int) -> None:
    count = blocks_in_slab(slab, block)
    inside = [
        sum(
            start <= index * block and (index + 1) * block <= start + slab
            for index in range(start // block, (start + slab) // block + 1)
        )
        for start in range(0, slab * block, slab)
    ]
    assert min(inside) == count


def test_the_groups_share_all_memory() -> None:
    for group in range(2):
        cache = build(num_slabs=3)
        assert cache.pools[group].num_free == 12
        taken = cache.pools[group].allocate(12)
        assert sorted(taken) == list(range(12))
        assert cache.pools[1 - group].num_free == 0
        with pytest.raises(OutOfBlocksError, match="1 blocks asked for, 0 free"):
            cache.pools[1 - group].allocate(1)
        cache.pools[group].release(taken)
        assert cache.pools[1 - group].num_free == 12
        cache.check_integrity()


def test_blocks_of_another_size_lie_inside_their_slabs() -> None:
    cache = build_slab_cache(NAMED, (2, 3), slab_pages=7, num_slabs=4)
    sizes = [cache.layout.slab_blocks(group) for group in range(2)]
    # Seven pages hold three blocks of two where one begins with the slab, but not everywhere.
    assert sizes == [3, 1]
    ends: set[int] = set()
    for group in (0, 1):
        pool = cache.pools[group]
        for block in pool.allocate(2 * sizes[group]):
            size = cache.layout.block_bytes(group)
            first, last = block * size, (block + 1) * size - 1
            assert first // cache.layout.slab_bytes == last // cache.layout.slab_bytes
            covered = set(range(first, last + 1))
            assert not covered & ends
            ends |= covered
    assert cache.pools[0].num_free == cache.pools[1].num_free == 0


def test_a_group_fills_its_fullest_slab_first() -> None:
    cache = build(num_slabs=3)
    pool = cache.pools[0]
    blocks = pool.allocate(12)
    by_slab = [blocks[index : index + 4] for index in (0, 4, 8)]
    pool.release([*by_slab[0][:3], *by_slab[1][:1], *by_slab[2][:2]])
    assert set(pool.allocate(1)) == set(by_slab[1][:1])
    assert set(pool.allocate(2)) == set(by_slab[2][:2])
    assert set(pool.allocate(3)) == set(by_slab[0][:3])


def test_a_free_slab_is_taken_before_anything_is_forgotten() -> None:
    cache = build(num_slabs=3)
    keyed(cache, 0, *names("r", 4))
    keyed(cache, 1, *names("s", 4))
    cache.pools[1].allocate(4)
    assert cache.cached_blocks == (4, 4)
    cache.pools[1].allocate(1)
    assert sum(cache.cached_blocks) < 8


def test_what_was_used_longest_ago_is_forgotten_in_whichever_group_it_is() -> None:
    for older in (0, 1):
        cache = build(num_slabs=2)
        keyed(cache, older, *names("old", 4))
        keyed(cache, 1 - older, *names("new", 4))
        # The group of the newer ones takes the other's slab rather than its own.
        cache.pools[1 - older].allocate(1)
        assert cache.pools[older].num_cached == 0
        assert cache.pools[1 - older].num_cached == 4
        cache = build(num_slabs=2)
        keyed(cache, older, *names("old", 4))
        keyed(cache, 1 - older, *names("new", 4))
        cache.pools[older].allocate(1)
        assert (cache.pools[older].num_cached, cache.pools[1 - older].num_cached) == (3, 4)


def test_a_slab_that_was_touched_is_not_the_oldest() -> None:
    cache = build_slab_cache(
        {**NAMED, "sliding": HeadPolicy(0, 5)}, (1, 1, 1), slab_pages=4, num_slabs=2
    )
    keyed(cache, 0, *names("a", 4))
    keyed(cache, 1, *names("b", 4))
    cache.pools[0].touch(names("a", 1))
    cache.pools[2].allocate(1)
    assert cache.cached_blocks == (4, 0, 0)


def test_passed_blocks_of_another_group_go_first() -> None:
    cache = build_slab_cache(
        {**NAMED, "sliding": HeadPolicy(0, 5)}, (1, 1, 1), slab_pages=4, num_slabs=2
    )
    keyed(cache, 0, *names("a", 4))
    pool = cache.pools[1]
    blocks = pool.allocate(4)
    for block, key in zip(blocks, names("b", 4), strict=True):
        pool.publish(block, key)
    pool.release(blocks, passed=True)
    cache.pools[2].allocate(1)
    assert cache.cached_blocks == (4, 0, 0)


def test_what_may_be_passed_does_not_shrink_with_the_group() -> None:
    cache = build(num_slabs=4)
    cache.pools[0].allocate(12)
    keyed(cache, 1, b"kept", b"kept too")
    pool = cache.pools[1]
    (block,) = pool.allocate(1)
    pool.publish(block, b"passed")
    pool.release([block], passed=True)
    (block,) = pool.allocate(1)
    pool.publish(block, b"passed too")
    pool.release([block], passed=True)
    # Half of what the group has is passed, and an eighth of what it could have.
    pool.allocate(1)
    assert [pool.find(key) is None for key in (b"kept", b"passed", b"passed too")] == [
        True,
        False,
        False,
    ]
    cache.pools[0].check_integrity(range(12))


def test_scattered_blocks_make_way_and_keep_what_they_hold() -> None:
    memory: ByteMemory[str]
    moves: list[BlockCopy] = []

    def copy_blocks(copies: Sequence[BlockCopy]) -> None:
        moves.extend(copies)
        memory.copy_blocks(copies)

    cache = build_slab_cache(NAMED, (1, 1), 4, 4, copy_blocks=copy_blocks)
    memory = ByteMemory[str](cache.layout)
    sequences = [cache.begin() for _ in range(8)]
    for sequence in sequences:
        cache.extend(sequence, 4)
    owners = {sequence: str(index) for index, sequence in enumerate(sequences)}
    for sequence, owner in owners.items():
        for group, table in enumerate(sequence.tables):
            for offset in range(4):
                memory[group, table.blocks[0] * 4 + offset] = owner
    # One block of each group is left in each of its two slabs.
    for index, sequence in enumerate(sequences):
        if index % 4:
            cache.free(sequence)
    cache.check_integrity()
    # Of 16 blocks two are owned in each group, and those of the other would fill half a slab.
    pool = cache.pools[0]
    assert pool.num_free == 10
    pool.release(pool.allocate(10))
    cache.check_integrity()
    assert cache._pools.num_moved == len(moves) == 1
    for sequence in sequences[::4]:
        for group, table in enumerate(sequence.tables):
            assert {memory[group, table.blocks[0] * 4 + offset] for offset in range(4)} == {
                owners[sequence]
            }


def test_what_has_moved_can_still_be_found_and_shared() -> None:
    cache = build(num_slabs=4)
    keys = cache.keys(cache.policies())
    tokens = list(range(8))
    keys.extend(tokens)
    keeper = cache.begin()
    first = cache.begin()
    cache.extend(first, 12)
    cache.extend(keeper, 8)
    cache.publish(keeper, keys)
    last = cache.begin()
    cache.extend(last, 8)
    cache.free(first)
    before = [table.blocks.tolist() for table in keeper.tables]
    pool = cache.pools[0]
    pool.release(pool.allocate(pool.num_free))
    assert cache._pools.num_moved > 0
    assert [table.blocks.tolist() for table in keeper.tables] != before
    match = cache.match(keys, 8)
    assert match.num_tokens == 4
    assert match.blocks == tuple(tuple(table.blocks[:1]) for table in keeper.tables)
    cache.begin(cache.policies(), match)
    cache.check_integrity()


def test_groups_that_share_an_arena_need_somebody_to_copy() -> None:
    layout = build(num_slabs=2).layout
    with pytest.raises(ValueError, match="need copy_blocks"):
        KVCache(build(2).groups, layout)


def test_a_layout_whose_slabs_hold_no_block_is_refused() -> None:
    members, page = (((0, 0),), ((0, 1), (0, 2))), PageLayout(4, 2, torch.float32)
    with pytest.raises(ValueError, match="slab_bytes must hold a block"):
        build_slab_layout(members, (page, page), page.page_bytes, 4)
    with pytest.raises(ValueError, match="num_slabs must be at least 1"):
        build_slab_layout(members, (page, page), 2 * page.page_bytes, 0)
    with pytest.raises(ValueError, match="as long as each other"):
        build_slab_layout(members, (page,), 2 * page.page_bytes, 4)


@pytest.mark.parametrize("damage", ["lost", "both", "owned", "listed", "blocks"])
def test_integrity_fails_if_a_slab_is_not_what_it_should_be(damage: str) -> None:
    cache = build(num_slabs=3)
    sequence = cache.begin()
    cache.extend(sequence, 8)
    slabs = cache._pools.slabs
    assert slabs is not None
    own = slabs.groups[0]
    (number,) = own.slabs
    if damage == "lost":
        slabs._free.pop()
    elif damage == "both":
        slabs._free.append(number)
    elif damage == "owned":
        own._slabs[number].num_owned -= 1
    elif damage == "listed":
        own._with_free[own._slabs[number].num_owned].clear()
    else:
        own._slabs[number].free[0] += own.size
    with pytest.raises(AssertionError):
        cache.check_integrity()


@given(
    st.lists(st.integers(1, 400), min_size=2, max_size=3),
    st.integers(0, 1 << 16),
)
def test_a_slab_is_the_one_that_strands_least(blocks: list[int], arena: int) -> None:
    arena += max(blocks) * len(blocks)
    chosen = choose_slab_bytes(blocks, arena)

    def stranded(slab: int) -> float:
        return straddled(blocks, slab) + len(blocks) * slab / arena

    sizes = range(max(blocks), arena // len(blocks) + 1, max(blocks))
    least = min(map(stranded, sizes))
    if chosen is None:
        assert least >= 1.0
    else:
        assert stranded(chosen) == pytest.approx(least)


def test_blocks_that_divide_each_other_strand_nothing() -> None:
    assert choose_slab_bytes([8, 8], 1 << 20) == 8
    assert choose_slab_bytes([8, 24], 1 << 20) == 24
    assert straddled([8, 24], 24) == 0.0


@settings(max_examples=150, deadline=None)
@given(
    members=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    slab_pages=st.integers(8, 15),
    num_slabs=st.integers(3, 12),
    wide_tokens=st.sampled_from([0, 0, 12]),
    seed=st.integers(0, 1 << 32),
)
def test_where_there_is_room_nobody_ever_lacks_a_block(
    members: tuple[int, int], slab_pages: int, num_slabs: int, wide_tokens: int, seed: int
) -> None:
    """Whatever was scattered before, and whatever else is cached."""
    plain = build_slab_cache(NAMED, members, slab_pages, num_slabs)
    cache = KVCache(
        plain.groups, plain.layout, copy_blocks=lambda copies: None, wide_tokens=wide_tokens
    )
    rng = random.Random(seed)
    runs: dict[SequenceCache, tuple[PrefixKeys, list[int], int]] = {}

    def reservations() -> list[Reservation]:
        return [Reservation(each.policies, length, each) for each, (*_, length) in runs.items()]

    def step(sequence: SequenceCache) -> None:
        keys, tokens, _ = runs[sequence]
        cache.extend(sequence, 1)
        keys.extend(tokens[: sequence.num_tokens])
        cache.publish(sequence, keys)

    for _ in range(25):
        policies = cache.policies(RETRIEVAL if rng.random() < 0.3 else None)
        tokens = [rng.randrange(2) for _ in range(rng.randint(1, 40))]
        keys = cache.keys(policies)
        keys.extend(tokens)
        match = cache.match(keys, len(tokens))
        if cache.has_room(Reservation(policies, len(tokens), match=match), reservations()):
            runs[cache.begin(policies, match)] = keys, tokens, len(tokens)
        for sequence in list(runs):
            for _ in range(rng.randint(0, 6)):
                if sequence.num_tokens < runs[sequence][2]:
                    step(sequence)
                    cache.release_expired(sequence)
            if rng.random() < 0.2:
                del runs[sequence]
                cache.free(sequence)
        cache.check_integrity()
    while growing := [each for each, (*_, length) in runs.items() if each.num_tokens < length]:
        # All of them take a token before any window moves.
        for sequence in growing:
            step(sequence)
        for sequence in growing:
            cache.release_expired(sequence)
    cache.check_integrity()


def test_room_is_left_for_wider_ones_by_the_others_alone() -> None:
    plain = build(num_slabs=16)
    cache = KVCache(plain.groups, plain.layout, copy_blocks=lambda copies: None, wide_tokens=64)
    full = cache.policies(RETRIEVAL)
    # 64 blocks in all, of which 16 are left for the wider: 44 of 176 tokens, and a window.
    assert cache.fits(176)
    assert not cache.fits(177)
    assert cache.fits(128, full)
    assert not cache.fits(129, full)
    held = cache.begin(full)
    cache.extend(held, 1)
    taken = [Reservation(full, 64, held)]
    # What the wide one holds in the other group is missing, and what it was to hold is there.
    assert cache.has_room(Reservation(cache.policies(), 112), taken)
    assert not cache.has_room(Reservation(cache.policies(), 113), taken)
