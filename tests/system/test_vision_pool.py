"""The vision replicas of a running system as one pool.

Most tests share a system with one simulated replica, whose only bucket holds 64 patches.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image

from common.membership import READY
from tests.preprocess.cases import encoded, noise
from tests.system.running import (
    GOLDEN,
    RECEIPT,
    ROOT,
    Running,
    ask_about,
    own_environment,
    text_of,
    until,
)
from tests.system.under_load import control_address

pytestmark = pytest.mark.system
SIMULATED = (
    "--model",
    str(GOLDEN / "a_image" / "checkpoint"),
    "--simulate-vision-ms",
    "100",
)
SMALL = ("--vision-buckets", "64", "--oversized-images", "refuse")
ANSWER = {
    "max_tokens": 8,
    "ignore_eos": True,
    "repetition_penalty": 1.0,
    "skip_special_tokens": False,
}
NUM_PICTURES = 12
NUM_DIFFERENT = 10


@pytest.fixture(scope="module")
def system() -> Iterator[Running]:
    arguments = ("--dtype", "float32", "--embedding-cache-mib", "0", *SMALL)
    with Running(*SIMULATED, *arguments) as running:
        yield running


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    return [encoded(noise(56, 56, seed)) for seed in range(NUM_PICTURES)]


@pytest.fixture(scope="module")
def texts(system: Running, pictures: list[bytes]) -> list[str]:
    """The undisturbed answers about the pictures."""
    answers = [ask(system, picture) for picture in pictures]
    assert [status for status, _ in answers] == [200] * NUM_PICTURES
    return [text for _, text in answers]


def ask(system: Running, picture: bytes) -> tuple[int, str]:
    status, answer = system.chat(ask_about(picture), **ANSWER)
    return status, text_of(answer) if status == 200 else answer["error"]["message"]


def test_a_simulated_replica_answers_each_picture_differently(texts: list[str]) -> None:
    assert len(set(texts)) >= NUM_DIFFERENT


def test_an_image_that_fits_no_bucket_is_refused_by_name(system: Running) -> None:
    status, message = ask(system, encoded(noise(392, 392)))
    assert status == 413
    assert "image 0" in message and "at most 64" in message


def test_requests_outlive_the_only_replica_with_work_in_hand(
    system: Running, pictures: list[bytes], texts: list[str]
) -> None:
    with ThreadPoolExecutor(NUM_PICTURES) as pool:
        asked = [pool.submit(ask, system, picture) for picture in pictures]
        [victim] = until(
            lambda: [m for m in system.members("vision") if m.in_flight], "an image is in hand"
        )
        os.kill(victim.pid, signal.SIGKILL)
        assert [one.result() for one in asked] == [(200, text) for text in texts]
    system.await_idle()


@contextmanager
def hanging_replica(system: Running) -> Iterator[None]:
    """Keep one more replica in the system, whose work loop hangs in its second image."""
    command = [
        sys.executable,
        "-m",
        "tests.system.hanging_vision",
        f"--controller={control_address(system)}",
        "--name=hanging",
        *SIMULATED,
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=own_environment())
    try:
        until(lambda: len(system.in_state("vision", READY)) == 2, "the replica is a member")
        yield
    finally:
        process.kill()
        process.wait()


def test_images_of_a_replica_that_hangs_go_to_another(
    system: Running, pictures: list[bytes], texts: list[str]
) -> None:
    """The connections of the hanging replica live, and its I/O thread goes on sending beats."""
    with hanging_replica(system), ThreadPoolExecutor(NUM_PICTURES) as pool:
        answers = list(pool.map(lambda picture: ask(system, picture), pictures))
        assert answers == [(200, text) for text in texts]
        until(
            lambda: [m.id.startswith("hanging") for m in system.members() if m.hung] == [True],
            "it is known to be hung",
        )
    reasons = [
        entry["reason"]
        for entry in system.logged(event="peer gone")
        if entry["peer"].startswith("hanging")
    ]
    assert "hung" in reasons[0]


def receipt(number: int) -> Image.Image:
    """Return the receipt with a corner that no receipt of another number has."""
    pixels = Image.open(RECEIPT).convert("RGB")
    pixels.putpixel((0, 0), (number, 2, 3))
    return pixels


def test_a_picture_is_encoded_once_whatever_its_file_and_preprocess(embedded: Running) -> None:
    whole = embedded.chat(ask_about(encoded(receipt(0))), max_tokens=4)[1]
    assert not whole["timings"]["images"][0]["cached"]
    other_file = encoded(receipt(0), "WEBP", lossless=True)

    def ask_again(_: int) -> Any:
        return embedded.chat(ask_about(other_file), max_tokens=4)[1]

    with ThreadPoolExecutor(4) as pool:  # at once, so that both preprocess replicas have work
        found = list(pool.map(ask_again, range(4)))
    assert [answer["timings"]["images"][0]["cached"] for answer in found] == [True] * 4
    assert {text_of(answer) for answer in found} == {text_of(whole)}


def test_a_frozen_replica_costs_its_requests_no_more_than_the_lease(embedded: Running) -> None:
    """The pictures are new, so that some of them are sent to the frozen replica."""
    pictures = [encoded(receipt(number)) for number in range(1, 5)]
    victim = embedded.members("vision")[0].pid
    os.kill(victim, signal.SIGSTOP)
    try:
        answers = ask_at_once(embedded, pictures)
    finally:
        os.kill(victim, signal.SIGCONT)
    until(
        lambda: [m.state for m in embedded.members("vision")] == [READY, READY],
        "the thawed replica joins again",
    )
    assert [status for status, _ in answers] == [200] * len(pictures)
    assert answers == ask_at_once(embedded, pictures)


def ask_at_once(system: Running, pictures: list[bytes]) -> list[tuple[int, str]]:
    def ask_whole(picture: bytes) -> tuple[int, str]:
        status, answer = system.chat(ask_about(picture))
        return status, text_of(answer)

    with ThreadPoolExecutor(len(pictures)) as pool:
        return list(pool.map(ask_whole, pictures))
