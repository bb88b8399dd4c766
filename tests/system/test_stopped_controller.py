"""A controller that is stopped is replaced, and requests do not notice."""

import os
import signal

import pytest

from common.membership import READY
from tests.system.running import Running, lives, text_of, until

pytestmark = pytest.mark.system
STAGES = {"gateway", "preprocess", "vision", "llm", "detokenizer"}
QUESTION = [{"role": "user", "content": "x"}]


def test_a_controller_that_is_stopped_is_replaced_while_requests_go_on() -> None:
    with Running() as system:
        stopped = system.pids()["controller"]
        expected = text_of(system.chat(QUESTION, max_tokens=4)[1])
        os.kill(stopped, signal.SIGSTOP)
        num_answers = 0
        while lives(stopped):
            status, answer = system.chat(QUESTION, max_tokens=4)
            assert (status, text_of(answer)) == (200, expected)
            num_answers += 1
        assert num_answers > 3
        assert system.logged(event="killed", name="controller-0")

        until(lambda: system.twinlens("status").returncode == 0, "the new controller answers")
        until(
            lambda: {member.role for member in system.members() if member.state == READY} >= STAGES,
            "all members have joined again",
        )
        assert system.pids()["controller"] != stopped
        assert system.twinlens("scale", "vision", "2").returncode == 0
        assert not system.logged(event="refused to join")
