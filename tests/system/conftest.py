"""One running system with the embedded model for all tests that leave it as they found it."""

from collections.abc import Iterator

import pytest

from tests.system.running import Running


@pytest.fixture(scope="session")
def embedded() -> Iterator[Running]:
    with Running("--vision", "2", "--preprocess", "2", "--detokenizer", "2") as system:
        yield system
