"""A block is free, or its one holder's to write, or named and nobody's to write."""

import pytest

from services.llm.block_pool import BlockPool


def named(pool: BlockPool, *names: bytes) -> list[int]:
    blocks = pool.allocate(len(names))
    for block, name in zip(blocks, names, strict=True):
        pool.name(block, name)
    return blocks


def test_no_block_is_handed_out_twice() -> None:
    pool = BlockPool(4)
    first = pool.allocate(3)
    second = pool.allocate(1)
    assert sorted(first + second) == [0, 1, 2, 3] and pool.num_free == 0


def test_more_than_there_is_cannot_be_allocated() -> None:
    with pytest.raises(AssertionError, match="3 blocks wanted, 2 are free"):
        BlockPool(2).allocate(3)


def test_freed_blocks_are_handed_out_again() -> None:
    pool = BlockPool(2)
    pool.free(pool.allocate(2))
    assert sorted(pool.allocate(2)) == [0, 1]


def test_a_block_cannot_be_freed_twice() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


def test_a_shared_block_is_free_when_its_last_holder_frees_it() -> None:
    pool = BlockPool(2)
    (block,) = named(pool, b"a")
    pool.share([block])
    pool.free([block])
    assert not pool.is_free(block) and pool.num_free == 1
    pool.free([block])
    assert pool.is_free(block) and pool.num_free == 2


def test_a_block_without_a_name_cannot_be_shared() -> None:
    pool = BlockPool(1)
    with pytest.raises(AssertionError, match="may still be written"):
        pool.share(pool.allocate(1))


def test_a_free_block_is_found_until_it_is_handed_out() -> None:
    pool = BlockPool(1)
    blocks = named(pool, b"a")
    pool.free(blocks)
    assert pool.find(b"a") == blocks[0]
    pool.allocate(1)
    assert pool.find(b"a") is None


def test_a_found_block_that_is_held_again_is_not_handed_out() -> None:
    pool = BlockPool(2)
    (block,) = named(pool, b"a")
    pool.free([block])
    pool.share([block])
    assert pool.num_free == 1 and pool.allocate(1) != [block]


def test_the_least_recently_freed_name_is_forgotten_first_and_of_a_prefix_its_end() -> None:
    pool = BlockPool(4)
    old = named(pool, b"a0", b"a1")
    new = named(pool, b"b0", b"b1")
    pool.free(old)
    pool.free(new)
    assert pool.allocate(4) == [old[1], old[0], new[1], new[0]]


def test_a_block_without_a_name_is_handed_out_before_one_with_a_name() -> None:
    pool = BlockPool(3)
    pool.free(named(pool, b"a", b"b"))
    pool.free(unnamed := pool.allocate(1))
    assert pool.allocate(1) == unnamed
    assert pool.find(b"a") is not None and pool.find(b"b") is not None


def test_of_two_blocks_with_equal_contents_the_first_is_found() -> None:
    pool = BlockPool(2)
    first = named(pool, b"a")
    second = named(pool, b"a")
    assert pool.find(b"a") == first[0]
    pool.free(second)
    pool.allocate(1)
    assert pool.find(b"a") == first[0]


def test_a_forgotten_block_stays_its_holders() -> None:
    pool = BlockPool(1)
    blocks = named(pool, b"a")
    pool.forget(blocks)
    assert pool.find(b"a") is None and pool.num_free == 0
