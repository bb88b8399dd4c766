"""The paths that the documentation names exist, so that no reader is sent to a file that moved."""

import re
from functools import cache
from pathlib import Path

import pytest

from tests.policy.sources import ROOT

DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "models/tiny-ocr/README.md",
    "examples/train_tiny_ocr/README.md",
    *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").glob("*.md")),
]
CODE = re.compile(r"```.*?```|`[^`]+`", re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")
PATH = re.compile(r"[\w.-]+(/[\w.-]+)*/?")
"""A relative path without placeholders such as <name>, globs or variables."""
SUFFIXES = (".py", ".c", ".h", ".proto", ".md", ".toml", ".yaml", "/")
"""A word that ends in one of these is a path of ours even if it names no top-level folder."""
NOT_OURS = {".git", ".gpu", ".venv", "build"}


@cache
def top_folders() -> set[str]:
    return {entry.name for entry in ROOT.iterdir() if entry.is_dir()} - NOT_OURS


@cache
def all_paths() -> list[str]:
    """Every file and folder below the top folders, as /PATH relative to the root."""
    paths = [path for folder in top_folders() for path in (ROOT / folder).rglob("*")]
    return [f"/{path.relative_to(ROOT)}" for path in paths]


def exists(path: str) -> bool:
    """Whether the path is there: from the root, or, if it is not that long, from any folder."""
    if path.partition("/")[0] in top_folders() or (ROOT / path).exists():
        return (ROOT / path).exists()
    return any(known.endswith(f"/{path.rstrip('/')}") for known in all_paths())


def paths_in_code(text: str) -> list[str]:
    """The words in backticks that name a path of the repository."""
    words = [word.strip("`,;:()\"'") for code in CODE.findall(text) for word in code.split()]
    return [
        word
        for word in words
        if PATH.fullmatch(word)
        and word not in SUFFIXES
        and (word.endswith(SUFFIXES) or ("/" in word and word.partition("/")[0] in top_folders()))
    ]


def missing_paths(text: str, folder: Path) -> list[str]:
    """The paths in backticks and in links that do not exist; links start from `folder`."""
    links = [link for link in LINK.findall(text) if "://" not in link]
    return [path for path in paths_in_code(text) if not exists(path)] + [
        link for link in links if not (folder / link).exists()
    ]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_that_a_document_names_exists(document: str) -> None:
    file = ROOT / document
    assert missing_paths(file.read_text(), file.parent) == []


@pytest.mark.parametrize(
    "text",
    [
        "`services/gateway/nothing.py`",
        "`services/nothing/`",
        "`nothing.py` and `core.py`",
        "`families/nothing.py`",
        "see `k8s/overlays/nothing`.",
        "`kubectl apply -k k8s/overlays/nothing`",
        "```sh\nkubectl apply -k k8s/overlays/nothing\n```",
        "[decisions](docs/nothing.md)",
        "[decisions](docs/nothing.md#wire)",
    ],
)
def test_a_path_that_does_not_exist_is_found(text: str) -> None:
    assert len(missing_paths(text, ROOT)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "`services/<name>/`",
        "`requirements/*.txt`",
        "`tests/{gateway,llm}/nothing.py`",
        "`/models/Qwen2.5-VL-3B-Instruct` and `/metrics`",
        "`TWINLENS_MODEL=/models/nothing.py`",
        "`python -m benchmarks.engine`, `deployment/vision` and `config.json`",
        "services/nothing.py in a sentence",
        "a changed `.proto`",
        "[a site](https://example.com/nothing.md)",
        "[a section](#nothing)",
    ],
)
def test_what_is_not_a_path_of_the_repository_is_ignored(text: str) -> None:
    assert missing_paths(text, ROOT) == []


def test_the_paths_of_a_document_are_looked_at() -> None:
    paths = paths_in_code((ROOT / "README.md").read_text())
    assert {"examples/receipt.png", "common/messages.py", "services/llm/families/"} <= set(paths)
