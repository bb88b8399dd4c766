"""`twinlens plan` measures the stages of a running system."""

import re

import pytest

from tests.system.running import RECEIPT, Running

pytestmark = pytest.mark.system


def test_a_running_system_is_measured(embedded: Running) -> None:
    planned = embedded.twinlens(
        "plan", "--image", str(RECEIPT), "--max-tokens", "2", "--concurrency", "2"
    )
    assert planned.returncode == 0, planned.stderr
    milliseconds = float(re.search(r"vision (\d+) ms an image", planned.stdout)[1])
    rate = float(re.search(r"answers ([\d.]+) requests a second", planned.stdout)[1])
    busy = float(re.search(r"keeps ([\d.]+) vision replicas busy", planned.stdout)[1])
    assert milliseconds > 0 and rate > 0
    assert busy == pytest.approx(rate * milliseconds / 1000, rel=0.1, abs=0.02)
