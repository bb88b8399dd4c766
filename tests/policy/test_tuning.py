"""The variables that tune the libraries are named in common/tuning.py and nowhere else.

A service applies them before it imports anything.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.tuning import TUNING
from tests.policy.sources import ROOT, parse

NAMES = {name for variables in TUNING.values() for name in variables}
FOLDERS = (
    ".ci",
    "benchmarks",
    "common",
    "compute",
    "docs",
    "examples",
    "k8s",
    "proto",
    "scripts",
    "services",
    "tests",
)
SUFFIXES = {"", ".c", ".h", ".md", ".py", ".sh", ".toml", ".yaml"}
ALLOWED = {
    "common/tuning.py",
    "tests/common/test_tuning.py",
    "docs/decisions.md",
    "docs/performance.md",
    "CHANGELOG.md",
}


def files() -> Iterator[Path]:
    """Yield every text file of the project."""
    yield from (file for file in ROOT.iterdir() if file.is_file())
    for folder in FOLDERS:
        yield from (file for file in (ROOT / folder).rglob("*") if file.is_file())


def names_in(text: str) -> set[str]:
    return {name for name in NAMES if name in text}


def test_no_other_file_names_a_tuning_variable() -> None:
    found = {
        str(file.relative_to(ROOT))
        for file in files()
        if file.suffix in SUFFIXES and names_in(file.read_text(errors="replace"))
    }
    assert found <= ALLOWED
    assert {"common/tuning.py", "tests/common/test_tuning.py"} <= found


def test_a_variable_in_a_dockerfile_would_be_found() -> None:
    some_name, *_ = NAMES
    assert names_in(f"ENV {some_name}=1 OTHER=2\n") == {some_name}


def first_statements(role: str) -> list[str]:
    """Return the first two statements after the docstring of a service's main module."""
    module = parse(Path("services", role, "__main__.py"))
    return [ast.unparse(statement) for statement in module.body[1:3]]


@pytest.mark.parametrize("role", TUNING)
def test_a_service_applies_its_tuning_before_it_imports_anything_else(role: str) -> None:
    assert first_statements(role) == [
        "from common.tuning import apply_tuning",
        f"if __name__ == '__main__':\n    apply_tuning('{role}')",
    ]
