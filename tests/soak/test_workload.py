"""A seed always makes the same calls, and they are of every kind."""

from collections import Counter

import numpy as np
import pytest

from services.preprocess.images import decode, open_image
from tests.soak.attacks import HTTP, http_body
from tests.soak.workload import (
    LOSSLESS,
    MANNERS,
    MISTAKES,
    POISONS,
    Picture,
    files_of,
    make_calls,
    picture_file,
)


def test_calls_are_those_of_their_seed() -> None:
    assert make_calls(7, 200, 40) == make_calls(7, 200, 40)
    assert make_calls(7, 200, 40) != make_calls(8, 200, 40)


def test_every_kind_of_call_is_among_them() -> None:
    calls = make_calls(1, 2000, 400)
    assert {call.manner for call in calls} == set(MANNERS)
    assert {call.mistake for call in calls} == {"", *MISTAKES}
    assert {len(call.question.pictures) for call in calls} == {0, 1, 2, 3, 4}
    assert {(call.api, call.is_streamed) for call in calls} == {
        (d, s) for d in ("http", "grpc") for s in (True, False)
    }
    assert {bool(call.question.temperature) for call in calls} == {True, False}
    assert any(call.question.stop for call in calls)


def test_questions_come_again_and_new_ones_come_until_the_end() -> None:
    calls = make_calls(1, 1000, 200)
    times = Counter(call.question for call in calls)
    assert max(times.values()) > 1 and len(times) > 180
    assert {call.question for call in calls[-100:]} - {call.question for call in calls[:-100]}


def test_lossless_files_of_one_picture_hold_the_same_pixels() -> None:
    picture = Picture(3, 100, 180, is_lossy=False)
    png, webp = (pixels(picture, file_format) for file_format in LOSSLESS)
    assert png.shape == (180, 100, 3)
    assert np.array_equal(png, webp)
    assert not np.array_equal(png, pixels(Picture(4, 100, 180, is_lossy=False), "PNG"))


def pixels(picture: Picture, file_format: str) -> np.ndarray:
    return np.asarray(decode(open_image(picture_file(picture, file_format))))


def test_a_mistaken_image_comes_after_the_good_ones() -> None:
    for call in make_calls(1, 800, 160):
        extra = call.mistake in ("no_image", "cut_off")
        assert len(files_of(call)) == len(call.question.pictures) + extra


def test_one_call_of_so_many_is_a_poison_and_each_kind_takes_its_turn() -> None:
    calls = make_calls(1, 2000, 400, poison_every=100)
    poisons = [call for call in calls if call.poison]
    assert [call.number for call in poisons] == list(range(99, 2000, 100))
    assert {call.poison for call in poisons} == set(POISONS)


@pytest.mark.parametrize("kind", HTTP)
def test_an_attack_has_a_body_that_could_be_a_request(kind: str) -> None:
    assert http_body(kind).startswith(b'{"')
