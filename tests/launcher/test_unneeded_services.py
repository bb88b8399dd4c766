"""Services that are started by themselves for a model that does not need them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.checkpoint import BadCheckpoint, open_checkpoint
from tests.golden import GoldenCase

ROOT = Path(__file__).parents[2]
VLMO = GoldenCase("vqa_base", "vlmo").checkpoint


@pytest.mark.parametrize("role", ["vision", "detokenizer"])
def test_such_a_service_says_which_ones_are_needed_and_exits(role: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", f"services.{role}", "--model", VLMO, "--log-format", "json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    [line] = map(json.loads, (ended.stdout + ended.stderr).splitlines())
    assert ended.returncode == 2
    assert line["event"] == "cannot start"
    assert f"needs no {role} service, only gateway, preprocess, llm" in line["reason"]


@pytest.mark.parametrize("role", ["preprocess", "vision", "llm", "detokenizer"])
def test_a_model_that_writes_needs_all(role: str) -> None:
    open_checkpoint(GoldenCase("a_chat_image", "qwen_vl").checkpoint).check_stage(role)


def test_a_model_that_labels_needs_no_tower() -> None:
    with pytest.raises(BadCheckpoint, match="do not start this one"):
        open_checkpoint(VLMO).check_stage("vision")
