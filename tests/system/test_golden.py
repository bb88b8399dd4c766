"""The golden cases through the running system: equal to the reference token for token, alone and
among others."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.system.running import GOLDEN, Running, golden_messages

CASES = sorted(case.name for case in GOLDEN.iterdir() if (case / "expected").exists())
WITHOUT_DEFAULTS = {
    "ignore_eos": True,
    "repetition_penalty": 1.0,
    "skip_special_tokens": False,
    "return_token_ids": True,
}


def test_there_are_cases() -> None:
    assert len(CASES) == 4


@pytest.mark.system
@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_equal_the_reference_alone_and_in_company(name: str) -> None:
    case = GOLDEN / name
    expected = json.loads((case / "expected" / "expected.json").read_text())
    with Running("--model", str(case / "checkpoint"), "--dtype", "float32") as system:

        def ask(messages: list[dict[str, Any]], **body: Any) -> tuple[list[int], str]:
            status, answer = system.chat(
                messages, **(WITHOUT_DEFAULTS | {"max_tokens": len(expected["greedy_ids"])} | body)
            )
            assert status == 200, answer
            return answer["choices"][0]["token_ids"], answer["choices"][0]["message"]["content"]

        messages = golden_messages(case)
        _, answer = system.chat(messages, max_tokens=1, return_token_ids=True)
        assert answer["prompt_token_ids"] == expected["input_ids"]
        wanted = (expected["greedy_ids"], expected["greedy_text"])
        assert ask(messages) == wanted
        # Without a value in the request the checkpoint's own repetition penalty holds.
        penalised = (expected["greedy_rp105_ids"], expected["greedy_rp105_text"])
        assert ask(messages, repetition_penalty=None) == penalised
        others = [
            [{"role": "user", "content": f"Number {i}. " + "One, two, three. " * i}]
            for i in range(7)
        ]
        alone = [ask(other) for other in others]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(ask, [*others[:4], messages, *others[4:]]))
        assert together[4] == wanted
        assert together[:4] + together[5:] == alone
