import pytest

from headlong.cache.block_pool import BlockPool, OutOfBlocksError


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
