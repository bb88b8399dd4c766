"""Downloads the wheels that a machine with torch, but without PyPI, lacks: `scripts/gpu --pack`.

Such a machine has Python 3.12 on x86-64 Linux, torch with CUDA, Triton, NumPy, transformers and
what these need. Versions are those of requirements/cuda.txt.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.serving import ROOT

FOLDER = ROOT / ".gpu" / "wheels"
LOCK = ROOT / "requirements" / "cuda.txt"
PYTHON = "3.12"
PLATFORMS = ("2_28", "2_27", "2_17", "2_12", "2_5")
CARRIED = (
    "annotated-types",
    "anyio",
    "blake3",
    "click",
    "googleapis-common-protos",
    "grpcio",
    "grpcio-health-checking",
    "grpcio-reflection",
    "grpcio-status",
    "h11",
    "httptools",
    "idna",
    "msgspec",
    "prometheus-client",
    "protobuf",
    "pydantic",
    "pydantic-core",
    "rich",
    "starlette",
    "structlog",
    "typing-extensions",
    "typing-inspection",
    "uvicorn",
)
"""What is missing there, or may be too old."""
FOR_TESTS = (
    "execnet",
    "iniconfig",
    "pluggy",
    "pytest",
    "pytest-asyncio",
    "pytest-timeout",
    "pytest-xdist",
)
PRESENT = (
    "jinja2",
    "markupsafe",
    "numpy",
    "pillow",
    "safetensors",
    "tokenizers",
    "torch",
)
"""What is there, or comes with what is there."""
MAX_BYTES = 64 * 2**20
"""What may be copied to the machine, the repository included."""
UNREAD = (ROOT / "models" / "tiny-ocr" / "model.safetensors",)
"""Large files that no part reads on a card."""


def main() -> int:
    """Fill the folder with wheels, and say how much there is to copy. Return the exit status."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    download(requirements(LOCK.read_text()), FOLDER)
    wheels = sum(file.stat().st_size for file in FOLDER.iterdir())
    tree = sum(file.stat().st_size for file in tracked_files(ROOT))
    print(f"{FOLDER}: {mebibytes(wheels)}; the repository: {mebibytes(tree)}")
    if objection := objection_to(wheels + tree):
        print(objection, file=sys.stderr)
        return 1
    print(f"together {mebibytes(wheels + tree)} of {mebibytes(MAX_BYTES)}")
    return 0


def requirements(lock: str) -> list[str]:
    """Return what to download, in the versions of the lock if it has them."""
    pinned = dict(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", lock, re.MULTILINE))
    return [*(f"{name}=={pinned[name]}" for name in CARRIED), *FOR_TESTS]


def download(wanted: list[str], folder: Path) -> None:
    platforms = [f"--platform=manylinux_{version}_x86_64" for version in PLATFORMS]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
            *("--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"),
            *(*platforms, "--platform=manylinux2014_x86_64", "--dest", str(folder), *wanted),
        ],
        check=True,
    )


def tracked_files(root: Path) -> list[Path]:
    """Return the files of the repository that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    return [root / name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def objection_to(total: int) -> str:
    """Return why this many bytes cannot be copied; empty if they can."""
    if total <= MAX_BYTES:
        return ""
    lines = [f"{mebibytes(total)} are more than the {mebibytes(MAX_BYTES)} that can be copied."]
    for file in UNREAD:
        if file.exists():
            name = file.relative_to(ROOT)
            size = mebibytes(file.stat().st_size)
            lines.append(f"No part reads {name} ({size}) on a card: leave it out of the copy.")
    return "\n".join(lines)


def mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
