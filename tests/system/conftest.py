"""A running system that the tests of several modules share. Each leaves it as it found it."""

from collections.abc import Iterator

import pytest

from tests.system.running import Running


@pytest.fixture(scope="session")
def embedded() -> Iterator[Running]:
    """The embedded model, with two replicas of each role that has replicas."""
    with Running("--vision", "2", "--preprocess", "2", "--detokenizer", "2") as system:
        yield system
