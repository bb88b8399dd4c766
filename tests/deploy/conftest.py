"""A real engine and the images, once for all tests; without an engine they are skipped."""

import shutil
import subprocess
import time

import pytest

from tests.policy.sources import ROOT

SHOWN = 4000
TEXT = {"capture_output": True, "text": True}


@pytest.fixture(scope="session")
def engine() -> None:
    """Skip the test if there is no Docker engine with Compose."""
    if not shutil.which("docker"):
        pytest.skip("no docker command here")
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        if (done := subprocess.run(command, **TEXT)).returncode:
            pytest.skip(f"{' '.join(command)}: {done.stderr.strip()[:200]}")


@pytest.fixture(scope="session")
def images(engine: None) -> float:
    """Build `twinlens:slim` and `twinlens:cpu` of this checkout. Return the seconds it took."""
    began = time.monotonic()
    done = subprocess.run([ROOT / "scripts" / "images", "slim", "cpu"], cwd=ROOT, **TEXT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-SHOWN:]
    return time.monotonic() - began
