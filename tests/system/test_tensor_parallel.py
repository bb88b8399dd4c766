"""A language group of several processes."""

import json
import os
import signal

import pytest

from tests.system.running import GOLDEN, Running, golden_messages, until

pytestmark = pytest.mark.system
CASE = GOLDEN / "c_gqa_tp8"


@pytest.mark.parametrize("tp", [2, 8])
def test_the_answer_is_the_reference_whatever_the_number_of_ranks(tp: int) -> None:
    expected = json.loads((CASE / "expected" / "expected.json").read_text())
    with Running(
        "--model", str(CASE / "checkpoint"), "--dtype", "float32", "--tp", str(tp)
    ) as system:
        assert sorted(m["rank"] for m in system.members("llm")) == list(range(tp))
        body = {
            "ignore_eos": True,
            "repetition_penalty": 1.0,
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        _, answer = system.chat(
            golden_messages(CASE), max_tokens=len(expected["greedy_ids"]), **body
        )
        assert answer["choices"][0]["token_ids"] == expected["greedy_ids"]


def test_a_rank_that_dies_takes_its_group_down_and_the_group_comes_back() -> None:
    with Running("--model", str(CASE / "checkpoint"), "--dtype", "float32", "--tp", "2") as system:
        ranks = {m["rank"]: m["pid"] for m in system.members("llm")}
        others = {m["pid"] for m in system.members() if m["role"] != "llm"}
        events = system.stream(golden_messages(CASE), max_tokens=200, ignore_eos=True)
        next(events)
        os.kill(ranks[1], signal.SIGKILL)
        assert not any("error" in event for event in events)
        until(lambda: system.get("/readyz")[0] == 200, "the group is back")
        assert not {m["pid"] for m in system.members("llm")} & set(ranks.values())
        assert {m["pid"] for m in system.members() if m["role"] != "llm"} == others, (
            "no other service was restarted"
        )
        assert system.chat(golden_messages(CASE), max_tokens=2)[0] == 200


def test_a_number_of_ranks_that_does_not_divide_is_refused_with_those_that_do() -> None:
    from tests.system.test_faults import serve

    ended = serve("--model", str(GOLDEN / "a_image" / "checkpoint"), "--tp", "8")
    assert ended.returncode == 2
    assert "use --tp 1, 2, 4" in ended.stderr
