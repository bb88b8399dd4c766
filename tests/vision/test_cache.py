"""The embedding cache is bounded in bytes and forgets the least recently used entries."""

import numpy as np

from common.wire import Tensor
from services.vision.cache import EmbeddingCache


def rows(count: int) -> Tensor:
    """Return embeddings of `count` times 16 bytes."""
    return Tensor.of(np.full((count, 4), count, np.float32))


def test_an_entry_is_found_and_another_is_not() -> None:
    cache = EmbeddingCache(100)
    embeddings = rows(2)
    cache.put("a", embeddings)
    assert cache.get("a") is embeddings
    assert cache.get("b") is None


def test_the_least_recently_used_are_dropped_until_the_rest_fits() -> None:
    cache = EmbeddingCache(4 * 16)
    for name in "abcd":
        cache.put(name, rows(1))
    cache.get("a")
    cache.put("e", rows(2))
    assert [name for name in "abcde" if cache.get(name) is not None] == ["a", "d", "e"]
    assert cache.num_bytes == 4 * 16
    assert (len(cache), cache.num_evicted) == (3, 2)


def test_an_entry_larger_than_the_cache_is_not_kept_and_displaces_nothing() -> None:
    cache = EmbeddingCache(2 * 16)
    cache.put("a", rows(2))
    cache.put("b", rows(3))
    assert cache.get("b") is None and cache.get("a") is not None
    assert cache.num_bytes == 2 * 16


def test_an_image_put_twice_is_counted_once() -> None:
    cache = EmbeddingCache(100)
    cache.put("a", rows(2))
    cache.put("a", rows(2))
    assert cache.num_bytes == 2 * 16


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = EmbeddingCache(0)
    cache.put("a", rows(1))
    assert cache.get("a") is None and cache.num_bytes == 0


def test_a_dropped_entry_is_absent_and_takes_no_room() -> None:
    cache = EmbeddingCache(100)
    cache.put("a", rows(2))
    cache.drop("a")
    cache.drop("b")
    assert cache.get("a") is None and cache.num_bytes == 0
