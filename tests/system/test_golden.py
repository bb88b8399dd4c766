"""The golden cases through the running system: equal to the reference token for token."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.preprocess.cases import encoded, noise
from tests.system.running import GOLDEN, Running, ask_about, golden_messages, text_of

CASES = sorted(case.name for case in GOLDEN.iterdir() if (case / "expected").exists())
SHARED_CASE = "a_image"
WITHOUT_DEFAULTS = {
    "ignore_eos": True,
    "repetition_penalty": 1.0,
    "skip_special_tokens": False,
    "return_token_ids": True,
}


def serving(case: str, *arguments: str) -> Running:
    return Running("--model", str(GOLDEN / case / "checkpoint"), "--dtype", "float32", *arguments)


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    with serving(SHARED_CASE) as system:
        yield system


@pytest.fixture
def system(name: str, request: pytest.FixtureRequest) -> Iterator[Running]:
    """A system that serves the checkpoint of the named case."""
    if name == SHARED_CASE:
        yield request.getfixturevalue("shared")
    else:
        with serving(name) as own:
            yield own


def test_there_are_cases() -> None:
    assert len(CASES) == 5


@pytest.mark.system
@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_equal_the_reference_alone_and_in_company(
    name: str, system: Running
) -> None:
    case = GOLDEN / name
    expected = json.loads((case / "expected" / "expected.json").read_text())

    def ask(messages: list[dict[str, Any]], **body: Any) -> tuple[list[int], str]:
        status, answer = system.chat(
            messages, **(WITHOUT_DEFAULTS | {"max_tokens": len(expected["greedy_ids"])} | body)
        )
        assert status == 200, answer
        return answer["choices"][0]["token_ids"], text_of(answer)

    messages = golden_messages(case)
    _, answer = system.chat(messages, max_tokens=1, return_token_ids=True)
    assert answer["prompt_token_ids"] == expected["input_ids"]
    wanted = (expected["greedy_ids"], expected["greedy_text"])
    assert ask(messages) == wanted
    # A request without a repetition penalty gets the checkpoint's own.
    penalised = (expected["greedy_rp105_ids"], expected["greedy_rp105_text"])
    assert ask(messages, repetition_penalty=None) == penalised
    others = [
        [{"role": "user", "content": f"Number {i}. " + "One, two, three. " * i}] for i in range(7)
    ]
    alone = [ask(other) for other in others]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, [*others[:4], messages, *others[4:]]))
    assert together[4] == wanted
    assert together[:4] + together[5:] == alone


def answers(system: Running, pictures: list[bytes]) -> list[str]:
    def ask(picture: bytes) -> tuple[int, Any]:
        return system.chat(ask_about(picture), **WITHOUT_DEFAULTS, max_tokens=8)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, pictures))
    assert [status for status, _ in found] == [200] * len(pictures)
    return [text_of(answer) for _, answer in found]


@pytest.mark.system
def test_static_shape_replicas_answer_as_others_do(shared: Running) -> None:
    sizes = ((56, 56), (84, 140), (308, 56), (196, 224))
    pictures = [encoded(noise(height, width)) for height, width in sizes]
    expected = answers(shared, pictures)
    buckets = ("--vision-buckets", "64,128,256", "--vision", "2")
    with serving(SHARED_CASE, *buckets) as system:
        assert answers(system, pictures) == expected
        too_large = encoded(noise(392, 392))
        assert len(answers(system, [too_large])) == 1, "it is resized"
