"""What all commands have in common."""

import os
import subprocess
import sys

import pytest

from tests.system.running import ROOT

TINY_OCR = str(ROOT / "models" / "tiny-ocr")


@pytest.mark.parametrize("command", [["plan", "--model", TINY_OCR], ["status", "--help"]])
def test_a_reader_that_closes_the_pipe_causes_no_traceback(command: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-m", "services.cli", *command],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    os.close(writer)
    assert "Traceback" not in ended.stderr
    assert ended.returncode in (0, 1)
