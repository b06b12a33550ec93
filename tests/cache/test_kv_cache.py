from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headlong.cache.block_copy import BlockCopy
from headlong.cache.block_pool import OutOfBlocksError
from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.cache.reservation import Reservation
from headlong.cache.sequence_cache import SequenceCache
from support import caches

STREAMING = HeadPolicy(sink_size=3, window_size=6)


def build_cache(
    policies: Sequence[HeadPolicy],
    block_sizes: Sequence[int],
    num_blocks: Sequence[int],
    copies: list[BlockCopy] | None = None,
) -> KVCache:
    """A cache that notes in `copies` what it has copied."""
    named = {f"g{index}": policy for index, policy in enumerate(policies)}
    return caches.build_cache(
        named,
        num_blocks,
        block_sizes,
        prefix_caching=False,
        copy_blocks=([] if copies is None else copies).extend,
    )


def reaching(cache: KVCache, num_tokens: int, sequence: SequenceCache | None = None) -> Reservation:
    return Reservation(cache.policies(), num_tokens, sequence)


def test_a_long_sequence_keeps_its_sinks_and_window() -> None:
    cache = build_cache([RETRIEVAL, STREAMING], [4, 4], [8, 8])
    sequence = cache.begin()
    cache.extend(sequence, 30)
    assert cache.owned_blocks == (8, 8)
    cache.release_expired(sequence)
    # The query at 30 sees 25 to 30: blocks 6 and 7, and block 0 of the sinks.
    assert cache.owned_blocks == (8, 3)
    assert cache.owned_bytes == cache.sequence_bytes(sequence) == 11 * 4 * 2 * 2 * 4
    assert sequence.num_tokens == 30
    cache.free(sequence)
    assert cache.owned_blocks == (0, 0)
    cache.check_integrity()


def test_running_out_in_the_last_group_takes_nothing_from_the_first() -> None:
    cache = build_cache([RETRIEVAL, STREAMING], [2, 4], [100, 2])
    sequence = cache.begin()
    assert cache.max_extension(sequence, 50) == 8
    with pytest.raises(OutOfBlocksError, match="3 g1 blocks asked for, 2 free"):
        cache.extend(sequence, 9)
    assert cache.owned_blocks == (0, 0)
    assert sequence.num_tokens == 0
    cache.extend(sequence, 8)
    assert cache.max_extension(sequence, 1) == 0
    cache.check_integrity()


def test_a_window_takes_its_new_block_before_it_gives_the_old_one_back() -> None:
    # The query at 8 sees 3 to 8: block 0 is still needed when block 2 begins.
    window = HeadPolicy(sink_size=0, window_size=6)
    assert (window.steady_blocks(9, 4), window.step_blocks(9, 4)) == (2, 3)
    for num_blocks in (2, 3):
        cache = build_cache([window], [4], [num_blocks])
        assert cache.fits(8)
        assert cache.fits(9) == cache.has_room(reaching(cache, 9), []) == (num_blocks == 3)
        sequence = cache.begin()
        for _ in range(8):
            cache.extend(sequence, 1)
            cache.release_expired(sequence)
        assert cache.max_extension(sequence, 1) == num_blocks - 2


def test_a_fork_shares_full_blocks_and_copies_the_partly_filled_one() -> None:
    copies: list[BlockCopy] = []
    cache = build_cache([RETRIEVAL, RETRIEVAL], [4, 3], [9, 9], copies)
    parent = cache.begin()
    cache.extend(parent, 9)
    child = cache.fork(parent)
    # 9 tokens: two blocks of 4 and one token, but exactly three blocks of 3.
    assert cache.owned_blocks == (4, 3)
    assert copies == [BlockCopy(0, parent.tables[0].blocks[2], child.tables[0].blocks[2])]
    assert child.tables[0].blocks[:2] == parent.tables[0].blocks[:2]
    assert child.tables[1].blocks == parent.tables[1].blocks
    assert child.num_tokens == 9
    cache.free(parent)
    assert cache.owned_blocks == (3, 3)
    cache.check_integrity()
    cache.free(child)
    assert cache.owned_blocks == (0, 0)


def test_a_fork_without_room_takes_nothing() -> None:
    cache = build_cache([RETRIEVAL, RETRIEVAL], [4, 4], [4, 2])
    parent = cache.begin()
    cache.extend(parent, 7)
    with pytest.raises(OutOfBlocksError, match="copy"):
        cache.fork(parent)
    assert cache.owned_blocks == (2, 2)
    cache.check_integrity()
    cache.free(parent)
    assert cache.owned_blocks == (0, 0)


def test_a_fork_of_nothing_owns_nothing() -> None:
    copies: list[BlockCopy] = []
    cache = build_cache([RETRIEVAL, STREAMING], [4, 4], [1, 1], copies)
    cache.fork(cache.begin())
    assert copies == []
    assert cache.owned_blocks == (0, 0)


def test_freeing_twice_is_refused() -> None:
    cache = build_cache([RETRIEVAL], [4], [2])
    sequence = cache.begin()
    cache.free(sequence)
    with pytest.raises(ValueError, match="freed before"):
        cache.free(sequence)
    cache.check_integrity()


def test_integrity_fails_on_a_block_that_no_live_table_lists() -> None:
    cache = build_cache([RETRIEVAL], [4], [2])
    sequence = cache.begin()
    cache.extend(sequence, 5)
    lost = sequence.tables[0].blocks.pop()
    with pytest.raises(AssertionError, match=f"block {lost}: 0 holders, counted 1"):
        cache.check_integrity()


def test_integrity_fails_on_a_table_without_room_for_its_tokens() -> None:
    cache = build_cache([RETRIEVAL], [4], [2])
    sequence = cache.begin()
    sequence.num_tokens = 1
    with pytest.raises(AssertionError):
        cache.check_integrity()


def test_room_counts_what_others_have_yet_to_grow() -> None:
    cache = build_cache([RETRIEVAL, STREAMING], [4, 4], [10, 10])
    other = cache.begin()
    cache.extend(other, 8)
    assert cache.has_room(reaching(cache, 32), [])
    assert not cache.has_room(reaching(cache, 33), [])
    growing = reaching(cache, 24, other)
    assert cache.has_room(reaching(cache, 16), [growing])
    assert not cache.has_room(reaching(cache, 17), [growing])
    # What another holds beyond its promised length is no gift.
    assert not cache.has_room(reaching(cache, 33), [reaching(cache, 4, other)])


@given(
    st.lists(
        st.tuples(
            st.builds(HeadPolicy, st.integers(0, 9), st.integers(1, 20)) | st.just(RETRIEVAL),
            st.integers(1, 5),
            st.integers(1, 14),
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 60),
    st.integers(1, 9),
)
def test_a_sequence_that_fits_has_room_and_can_always_go_on(
    groups: list[tuple[HeadPolicy, int, int]], num_tokens: int, chunk: int
) -> None:
    policies, block_sizes, num_blocks = zip(*groups, strict=True)
    cache = build_cache(policies, block_sizes, num_blocks)
    if not cache.fits(num_tokens):
        return
    assert cache.has_room(reaching(cache, num_tokens), [])
    sequence = cache.begin()
    while sequence.num_tokens < num_tokens:
        count = cache.max_extension(sequence, min(chunk, num_tokens - sequence.num_tokens))
        assert count > 0
        cache.extend(sequence, count)
        cache.release_expired(sequence)
    cache.check_integrity()
