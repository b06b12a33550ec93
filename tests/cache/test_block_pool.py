import pytest

from headlong.cache.block_pool import REMEMBERED, BlockPool, OutOfBlocksError


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks"):
        BlockPool(0)


def test_allocated_blocks_are_distinct_and_counted() -> None:
    pool = BlockPool(5)
    blocks = pool.allocate(3) + pool.allocate(2)
    assert sorted(blocks) == [0, 1, 2, 3, 4]
    assert (pool.num_free, pool.num_owned) == (0, 5)
    pool.check_integrity(blocks)


def test_exhaustion_takes_nothing() -> None:
    pool = BlockPool(3)
    held = pool.allocate(2)
    with pytest.raises(OutOfBlocksError, match="2 blocks asked for, 1 free"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.check_integrity(held)
    assert len(pool.allocate(1)) == 1


def test_none_can_be_allocated_from_an_empty_pool() -> None:
    pool = BlockPool(1)
    pool.allocate(1)
    assert pool.allocate(0) == []


def test_a_shared_block_is_free_after_its_last_owner() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.share([block])
    assert pool.num_owned == 1
    pool.check_integrity([block, block])
    pool.release([block])
    assert pool.num_owned == 1
    pool.release([block])
    assert pool.num_owned == 0
    pool.check_integrity([])


def test_a_free_block_can_be_neither_released_nor_shared() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(ValueError, match=f"block {block} is free.*cannot be"):
        pool.release([block])
    with pytest.raises(ValueError, match=f"block {block} is free.*cannot be shared"):
        pool.share([block])
    pool.check_integrity([])
    assert pool.num_free == 2


@pytest.mark.parametrize("held", [[], [0, 0], [1], [0, 1]])
def test_integrity_fails_if_the_holders_are_others(held: list[int]) -> None:
    pool = BlockPool(2)
    assert pool.allocate(1) == [0]
    with pytest.raises(AssertionError, match=r"block [01]:"):
        pool.check_integrity(held)


def test_a_released_block_is_used_again_last() -> None:
    pool = BlockPool(3)
    first = pool.allocate(1)
    pool.release(first)
    assert pool.allocate(3)[-1:] == first


def keyed(pool: BlockPool, *keys: bytes) -> list[int]:
    """Blocks that were published under the keys and given back, the first of them first."""
    blocks = pool.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    pool.release(blocks)
    return blocks


def test_a_released_block_with_a_key_stays_and_can_be_shared() -> None:
    pool = BlockPool(3)
    (block,) = keyed(pool, b"a")
    assert (pool.num_free, pool.num_cached, pool.num_owned) == (3, 1, 0)
    assert pool.find(b"a") == block
    assert not pool.is_owned(block)
    pool.share([block])
    assert (pool.num_free, pool.num_cached, pool.num_owned) == (2, 0, 1)
    assert pool.is_owned(block)
    assert pool.holds(block, b"a")
    pool.check_integrity([block])


def test_free_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(3)
    (block,) = keyed(pool, b"a")
    taken = pool.allocate(2)
    assert block not in taken
    assert pool.find(b"a") == block
    assert pool.allocate(1) == [block]
    assert pool.find(b"a") is None
    assert not pool.holds(block, b"a")
    pool.check_integrity([block, *taken])


def test_the_least_recently_used_block_is_evicted_first() -> None:
    pool = BlockPool(3)
    first, second, third = keyed(pool, b"a", b"b", b"c")
    pool.share([first])
    pool.release([first])
    pool.touch([b"b", b"nowhere"])
    assert pool.allocate(3) == [third, first, second]


def test_an_evicted_key_is_remembered_until_it_is_found_again() -> None:
    pool = BlockPool(1)
    keyed(pool, b"a")
    assert pool.knew(b"a")
    held = pool.allocate(1)
    assert pool.find(b"a") is None
    assert pool.knew(b"a")
    assert not pool.knew(b"b")
    pool.publish(held[0], b"a")
    pool.check_integrity(held)


def test_the_memory_of_evicted_keys_is_bounded() -> None:
    pool = BlockPool(2)
    for number in range(100):
        keyed(pool, bytes([number]))
    known = [number for number in range(100) if pool.knew(bytes([number]))]
    assert known == list(range(100 - 2 - REMEMBERED * 2, 100))


def test_an_owned_block_is_never_evicted() -> None:
    pool = BlockPool(2)
    blocks = keyed(pool, b"a", b"b")
    pool.share(blocks[:1])
    assert pool.allocate(1) == blocks[1:]
    with pytest.raises(OutOfBlocksError):
        pool.allocate(1)
    assert pool.find(b"a") == blocks[0]


def test_a_key_stays_with_the_block_that_had_it_first() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    assert pool.find(b"a") == first
    pool.release([first, second])
    # The second has no key, so it is free at once.
    assert (pool.num_cached, pool.num_free) == (1, 3)
    pool.check_integrity([])


def test_a_block_keeps_its_first_key() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a")
    pool.publish(block, b"b")
    assert pool.find(b"a") == block
    assert pool.find(b"b") is None
    pool.check_integrity([block])


def test_only_an_owned_block_can_be_published() -> None:
    pool = BlockPool(2)
    (block,) = keyed(pool, b"a")
    with pytest.raises(ValueError, match=f"block {block} has no owner"):
        pool.publish(block, b"b")
    pool.check_integrity([])


def test_a_cached_block_cannot_be_released_again() -> None:
    pool = BlockPool(1)
    (block,) = keyed(pool, b"a")
    with pytest.raises(ValueError, match=f"block {block} is free or cached"):
        pool.release([block])


def test_what_is_forgotten_is_free() -> None:
    pool = BlockPool(3)
    keyed(pool, b"a", b"b")
    (held,) = pool.allocate(1)
    pool.publish(held, b"c")
    pool.forget()
    assert (pool.num_cached, pool.num_free) == (0, 2)
    assert pool.find(b"a") is None
    assert pool.find(b"c") == held
    pool.check_integrity([held])


def passed(pool: BlockPool, *keys: bytes) -> list[int]:
    """Blocks that were published under the keys and that a window has left."""
    blocks = pool.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    pool.release(blocks, passed=True)
    return blocks


def test_passed_blocks_are_evicted_first_down_to_a_quarter() -> None:
    pool = BlockPool(8)
    kept = keyed(pool, b"a", b"b", b"c", b"d")
    left = passed(pool, b"e", b"f", b"g", b"h")
    taken = pool.allocate(8)
    # Two of eight may stay for as long as there are others.
    assert taken == [*left[:2], *kept, *left[2:]]
    pool.check_integrity(taken)


def test_a_passed_block_that_was_found_is_kept() -> None:
    pool = BlockPool(4)
    first, second = passed(pool, b"a", b"b")
    pool.share([first])
    pool.release([first], passed=True)
    third, _ = passed(pool, b"c", b"d")
    assert pool.allocate(2) == [second, third]
    assert pool.find(b"a") == first
    pool.check_integrity([second, third])


@pytest.mark.parametrize("key", [b"a", None])
def test_that_a_block_was_found_is_forgotten_with_its_contents(key: bytes | None) -> None:
    pool = BlockPool(2)
    block, other = pool.allocate(2)
    if key is not None:
        pool.publish(block, key)
    pool.share([block])
    pool.release([block, block])
    assert pool.allocate(1) == [block]
    pool.publish(block, b"b")
    pool.publish(other, b"c")
    pool.release([other])
    pool.release([block], passed=True)
    # One of two is more than a quarter: what was passed goes first, although it is newer.
    assert pool.allocate(1) == [block]
    pool.check_integrity([block])


@pytest.mark.parametrize("damage", ["_keys", "_found", "_kept", "_free", "_evicted"])
def test_integrity_fails_if_a_cached_block_is_not_what_it_should_be(damage: str) -> None:
    pool = BlockPool(2)
    (block,) = keyed(pool, b"a")
    if damage == "_keys":
        pool._keys[block] = None
    elif damage == "_found":
        pool._found[b"b"] = block
    elif damage == "_kept":
        del pool._kept[block]
    elif damage == "_free":
        pool._free.append(block)
    else:
        pool._evicted[b"a"] = None
    with pytest.raises(AssertionError):
        pool.check_integrity([])
