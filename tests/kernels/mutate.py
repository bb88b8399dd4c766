"""Breaks each Triton kernel in one place after the other, and shows that a test notices.

    python -m tests.kernels.mutate [--only PART]

It changes a copy of the repository. It is not part of CI, because it takes minutes.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

import pytest
import torch  # noqa: F401  so that no mutant has to load it
import triton  # noqa: F401

ROOT = Path(__file__).parents[2]
LEFT_OUT = (".git", ".venv", ".*_cache", "__pycache__")
PACKAGES = ("common", "compute", "proto", "services", "tests")
RED = 1
"""What pytest returns if a test failed."""
PATIENCE = 120
"""Seconds after which a mutant counts as noticed: a loop may never end."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """One change of a source file, and the tests that should notice it."""

    path: str
    """From the root of the repository."""
    kernel: str
    """The function that holds the changed text. The text must be there just once."""
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def label(self) -> str:
        """The change in one line of a table."""
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"`{old}` → {f'`{new}`' if new else 'nothing'}".replace("|", "\\|")

    def applied_to(self, source: str) -> str:
        """Return the source with the change."""
        start = source.index(f"def {self.kernel}(")
        end = source.find("\n\n\n", start)
        end = len(source) if end < 0 else end
        body = source[start:end]
        count = body.count(self.old)
        assert count == 1, f"{self.path}: {self.kernel} has {self.old!r} {count} times"
        return source[:start] + body.replace(self.old, self.new) + source[end:]


def verdict(copy: Path, mutation: Mutation) -> str:
    """Run the tests on a mutant: "red", or "SURVIVED"."""
    file = copy / mutation.path
    source = file.read_text(encoding="utf-8")
    file.write_text(mutation.applied_to(source), encoding="utf-8")
    try:
        return "SURVIVED" if passes(copy, mutation.tests) else "red"
    finally:
        file.write_text(source, encoding="utf-8")


def passes(copy: Path, tests: Sequence[str]) -> bool:
    """Whether the tests pass. A crash of the process, and a time-out, are noticed, too.

    The process is forked from this one, so that it need not load torch and Triton.
    """
    process = multiprocessing.get_context("fork").Process(target=run, args=(copy, tests))
    process.start()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
    code = process.exitcode
    assert code is not None and code <= RED, f"pytest cannot run {tests}"
    return code == 0


def run(copy: Path, tests: Sequence[str]) -> NoReturn:
    """Run the tests in the copy, and exit as pytest does."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os._exit(pytest.main(["--exitfirst", "--quiet", "-p", "no:cacheprovider", *tests]))


def main() -> int:
    """Return 0 if every mutant is noticed, else 1."""
    from tests.kernels.mutations import MUTATIONS

    parser = argparse.ArgumentParser(description="Break each Triton kernel, and run its tests.")
    parser.add_argument("--only", default="", help="kernels with this in the name or the path")
    only = parser.parse_args().only
    chosen = [m for m in MUTATIONS if only in f"{m.path} {m.kernel}"]
    print("| kernel | mutation | verdict | seconds |\n|---|---|---|---:|", flush=True)
    num_survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for tests in dict.fromkeys(mutation.tests for mutation in chosen):
            assert passes(copy, tests), f"{tests} fail without a mutation"
        for mutation in chosen:
            start = time.monotonic()
            found = verdict(copy, mutation)
            num_survivors += found != "red"
            seconds = time.monotonic() - start
            print(f"| {mutation.kernel} | {mutation.label} | {found} | {seconds:.0f} |", flush=True)
    print(f"\n{num_survivors} of {len(chosen)} survived")
    return 1 if num_survivors else 0


if __name__ == "__main__":
    sys.exit(main())
