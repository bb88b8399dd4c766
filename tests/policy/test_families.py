"""A family is known only in its `families/` folders: others import the folder's package."""

import ast
from pathlib import Path

import pytest

from tests.policy.sources import ROOT, imports, parse, sources

OPEN = ("common.families.family",)
"""The modules inside a `families/` folder that may be imported from outside."""


def family_modules() -> list[str]:
    """Return the dotted names of all modules inside a `families/` folder."""
    files = [file for file in sources() if file.parent.name == "families"]
    return [
        ".".join(file.with_suffix("").parts)
        for file in files
        if file.name != "__init__.py" and ".".join(file.with_suffix("").parts) not in OPEN
    ]


def imported_families(tree: ast.AST) -> list[str]:
    """Return the imports of a module inside a `families/` folder."""
    closed = family_modules()
    return [
        name
        for name in imports(tree)
        if any(f"{name}.".startswith(f"{module}.") for module in closed)
    ]


OUTSIDE = [file for file in sources() if file.parent.name != "families"]


@pytest.mark.parametrize("file", OUTSIDE, ids=str)
def test_nothing_outside_families_imports_a_family(file: Path) -> None:
    assert imported_families(parse(file)) == []


@pytest.mark.parametrize(
    "line",
    [
        "from services.preprocess.families.qwen2_5_vl import Image",
        "from services.preprocess.families import qwen2_5_vl",
        "import services.vision.families.qwen2_5_vl",
        "from common.families.qwen2_5_vl import merge_size",
        "def f():\n    from services.llm.families import qwen2_5_vl",
    ],
)
def test_an_import_of_a_family_is_found(line: str) -> None:
    assert imported_families(ast.parse(line)) != []


@pytest.mark.parametrize(
    "line",
    [
        "from services.preprocess.families import FamilyRules, load",
        "from services.preprocess import families",
        "from common.families import FAMILIES",
        "from common.families.family import BadCheckpoint",
    ],
)
def test_the_packages_and_the_description_are_open(line: str) -> None:
    assert imported_families(ast.parse(line)) == []


def test_every_stage_has_a_folder_that_is_looked_at() -> None:
    stages = {module.rpartition(".families.")[0] for module in family_modules()}
    assert stages == {
        "common",
        "services.preprocess",
        "services.vision",
        "services.llm",
        "services.commands.verification",
    }
    assert all((ROOT / stage.replace(".", "/") / "families").is_dir() for stage in stages)
