"""Files that others made, which lie next to the project and are not a part of it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def foreign(name: str) -> Path:
    """Return a file or folder of ../shared/foreign; skip the test where it is absent."""
    for folder in ROOT.parents:
        if (path := folder / "shared" / "foreign" / name).exists():
            return path
    pytest.skip(f"there is no ../shared/foreign/{name}")
