"""The checked-in protobuf code is what scripts/proto makes of the .proto files, and they are
clean."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.policy.sources import ROOT

BIN = Path(sys.executable).parent


def generated(root: Path) -> dict[str, bytes]:
    files = [
        file for pattern in ("*_pb2*.py", "*_pb2*.pyi") for file in (root / "proto").rglob(pattern)
    ]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


def run(*command: str | Path, cwd: Path) -> str:
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the script makes of the .proto files alone, with the tools that run this test."""
    root = tmp_path_factory.mktemp("fresh")
    shutil.copytree(
        ROOT / "proto", root / "proto", ignore=shutil.ignore_patterns("*_pb2*", "__pycache__")
    )
    activate = root / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    run("sh", ROOT / "scripts" / "proto", cwd=root)
    return generated(root)


def test_every_proto_has_its_generated_files(fresh: dict[str, bytes]) -> None:
    stems = {file.relative_to(ROOT).with_suffix("") for file in (ROOT / "proto").rglob("*.proto")}
    expected = {
        f"{stem}_pb2{kind}" for stem in stems for kind in (".py", ".pyi", "_grpc.py", "_grpc.pyi")
    }
    assert len(stems) >= 2
    assert fresh.keys() == expected == generated(ROOT).keys()


def test_the_generated_code_is_current(fresh: dict[str, bytes]) -> None:
    stale = [name for name, content in generated(ROOT).items() if fresh[name] != content]
    assert not stale, "run scripts/proto"


def test_buf_finds_nothing_to_complain_of() -> None:
    assert run(BIN / "buf", "lint", "proto", cwd=ROOT) == ""
