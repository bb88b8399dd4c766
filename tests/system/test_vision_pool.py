"""The vision replicas of a running system as one pool: buckets, the cache, a pool that is empty for
a moment."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
from PIL import Image

from tests.preprocess.cases import encoded, noise
from tests.system.running import GOLDEN, RECEIPT, Running, ask_about, text_of, until

pytestmark = pytest.mark.system

MODEL = ("--model", str(GOLDEN / "a_image" / "checkpoint"), "--dtype", "float32")
ANSWER = {
    "max_tokens": 8,
    "ignore_eos": True,
    "repetition_penalty": 1.0,
    "skip_special_tokens": False,
}


def answers(system: Running, pictures: list[bytes]) -> list[str]:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda picture: system.chat(ask_about(picture), **ANSWER), pictures))
    assert [status for status, _ in found] == [200] * len(pictures)
    return [text_of(answer) for _, answer in found]


def test_static_shape_replicas_answer_as_others_do() -> None:
    pictures = [
        encoded(noise(height, width))
        for height, width in ((56, 56), (84, 140), (308, 56), (196, 224))
    ]
    with Running(*MODEL) as system:
        expected = answers(system, pictures)
    with Running(*MODEL, "--vision-buckets", "64,128,256", "--vision", "2") as system:
        assert answers(system, pictures) == expected
        too_large = encoded(noise(392, 392))
        assert system.chat(ask_about(too_large), **ANSWER)[0] == 200, "it is made smaller"
    with Running(*MODEL, "--vision-buckets", "64", "--oversized-images", "refuse") as system:
        status, refused = system.chat(ask_about(too_large), **ANSWER)
        assert (
            status == 413
            and "image 0" in refused["error"]["message"]
            and "at most 64" in refused["error"]["message"]
        )


def test_a_picture_is_encoded_once_whatever_its_file_and_preprocess() -> None:
    with Running("--vision", "3", "--preprocess", "2") as system:
        whole = system.chat(ask_about(RECEIPT), max_tokens=4)[1]
        assert not whole["timings"]["images"][0]["cached"]
        other_file = BytesIO()
        Image.open(RECEIPT).convert("RGB").save(other_file, "WEBP", lossless=True)
        with ThreadPoolExecutor(4) as pool:  # at once, so that both preprocess replicas have work
            found = list(
                pool.map(
                    lambda _: system.chat(ask_about(other_file.getvalue()), max_tokens=4), range(4)
                )
            )
        assert [answer["timings"]["images"][0]["cached"] for _, answer in found] == [True] * 4
        assert {text_of(answer) for _, answer in found} == {text_of(whole)}


def test_requests_outlive_the_only_replica_with_work_in_hand() -> None:
    with Running("--simulate-vision-ms", "300", *MODEL) as system:
        pictures = [encoded(noise(56, 56, seed)) for seed in range(8)]
        expected = answers(system, pictures)
    with Running("--simulate-vision-ms", "300", *MODEL) as system:
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(system.chat, ask_about(picture), **ANSWER) for picture in pictures]
            [victim] = until(
                lambda: [m for m in system.members("vision") if m["in_flight"]],
                "an image is in hand",
            )
            os.kill(victim["pid"], signal.SIGKILL)
            found = [one.result() for one in asked]
        assert [status for status, _ in found] == [200] * 8
        assert [text_of(answer) for _, answer in found] == expected
        until(
            lambda: all(m["in_flight"] + m["queued"] == 0 for m in system.members()),
            "nothing is held",
        )
