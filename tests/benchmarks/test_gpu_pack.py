"""What `scripts/gpu --pack` downloads, and how much may be copied."""

import re
import tomllib
from pathlib import Path

import pytest

from benchmarks.gpu import pack
from benchmarks.serving import ROOT


def test_every_dependency_is_carried_or_known_to_be_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["engine"]
    names = {re.split(r"[<>=\[;]", each)[0] for each in needed}
    assert names <= {*pack.CARRIED, *pack.PRESENT}


def test_versions_are_those_of_the_lock() -> None:
    wanted = pack.requirements(pack.LOCK.read_text())
    assert len(wanted) == len(pack.CARRIED) + len(pack.FOR_TESTS)
    assert all("==" in each for each in wanted[: len(pack.CARRIED)])


def test_too_much_is_refused_with_what_can_be_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    large = tmp_path / "large.bin"
    large.write_bytes(bytes(2**20))
    monkeypatch.setattr(pack, "ROOT", tmp_path)
    monkeypatch.setattr(pack, "UNREAD", (large, tmp_path / "missing"))
    assert pack.objection_to(pack.MAX_BYTES) == ""
    refusal = pack.objection_to(pack.MAX_BYTES + 1).splitlines()
    assert refusal[0] == "64.0 MiB are more than the 64.0 MiB that can be copied."
    assert refusal[1:] == ["No part reads large.bin (1.0 MiB) on a card: leave it out of the copy."]


def test_files_that_git_ignores_do_not_count() -> None:
    files = pack.tracked_files(ROOT)
    assert ROOT / "scripts" / "gpu" in files
    assert not any(".venv" in file.parts for file in files)
