"""A member whose work loop hangs while it says that it lives: its peers leave it, and its work is
done elsewhere."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.preprocess.test_images import encoded, noise
from tests.system.running import GOLDEN, ROOT, Running, ask_about, own_environment, text_of, until
from tests.system.test_faults_under_load import control_address
from tests.system.under_load import list_members

pytestmark = pytest.mark.system
MODEL = str(GOLDEN / "a_image" / "checkpoint")
SIMULATED = ["--model", MODEL, "--simulate-vision-ms", "100"]
BODY = {
    "max_tokens": 4,
    "ignore_eos": True,
    "repetition_penalty": 1.0,
    "skip_special_tokens": False,
}
NUM_IMAGES = 12


@pytest.fixture
def system() -> Iterator[Running]:
    with Running("--dtype", "float32", "--embedding-cache-mib", "0", *SIMULATED) as running:
        yield running


def test_images_of_a_replica_that_hangs_go_to_another(system: Running) -> None:
    pictures = [encoded(noise(56, 56, seed)) for seed in range(NUM_IMAGES)]
    expected = [text_of(system.chat(ask_about(picture), **BODY)[1]) for picture in pictures]
    command = [
        sys.executable,
        "-m",
        "tests.system.hanging_vision",
        f"--controller={control_address(system)}",
        "--name=hanging",
        *SIMULATED,
    ]
    hanging = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=own_environment())
    try:
        until(lambda: len(system.members("vision")) == 2, "the replica is a member")
        with ThreadPoolExecutor(NUM_IMAGES) as pool:
            answers = list(
                pool.map(lambda picture: system.chat(ask_about(picture), **BODY), pictures)
            )
        assert [(status, text_of(answer)) for status, answer in answers] == [
            (200, text) for text in expected
        ]
        until(
            lambda: [m.id.startswith("hanging") for m in list_members(system) if m.hung] == [True],
            "it is known to be hung",
        )
    finally:
        hanging.kill()
        hanging.wait()
    reasons = [
        entry["reason"]
        for entry in system.logged(event="peer gone")
        if entry["peer"].startswith("hanging")
    ]
    assert "hung" in reasons[0]
