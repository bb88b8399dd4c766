"""One prompt for several answers: it is prepared once, and each answer is routed and reported."""

from typing import Any

import pytest

from common.events import PeerDown
from common.messages import Failed, Prompt, Routed, Sibling
from common.wire import Tensor
from tests.preprocess.builders import (
    IMAGES,
    LLM,
    Preprocess,
    arrived,
    failures,
    submit,
)

SIBLINGS = (Sibling("r.1", 8), Sibling("r.2", 9))
ALL = ["r", "r.1", "r.2"]


def test_each_answer_is_routed_before_the_one_prompt_is_sent() -> None:
    preprocess = Preprocess("v1")
    *routes, (to, prompt) = preprocess.play(submit("r", siblings=SIBLINGS))
    assert [message.request_id for _, message in routes] == ALL
    assert all(isinstance(message, Routed) and message.llm == LLM for _, message in routes)
    assert isinstance(prompt, Prompt) and (to, prompt.siblings) == (LLM.id, SIBLINGS)
    assert len(preprocess.tasks.started) == 1


def test_each_answer_is_handed_over_with_the_last_item() -> None:
    preprocess = Preprocess("v1")
    preprocess.dispatch("r", *IMAGES[:2], siblings=SIBLINGS)
    for item in range(2):
        preprocess.play(arrived(item))
    assert preprocess.encoded == ALL and preprocess.holds_nothing


@pytest.mark.parametrize("images", [(), IMAGES[:1]], ids=["text", "image"])
def test_each_answer_of_a_lost_group_is_reported(images: tuple[bytes, ...]) -> None:
    preprocess = Preprocess("v1")
    preprocess.play(submit("r", *images, siblings=SIBLINGS))
    sent = preprocess.play([PeerDown(LLM.id, "llm", "gone")])
    assert failures(sent) == [("gateway-1", id, "Unavailable", None) for id in ALL]
    assert preprocess.holds_nothing


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"siblings": (Sibling("r", 8),)}, "the same request id"),
        ({"siblings": (Sibling("a", 8), Sibling("a", 9))}, "the same request id"),
        ({"siblings": SIBLINGS, "output_token_ids": Tensor("int64", (1,), bytes(8))}, "not begun"),
    ],
)
def test_what_cannot_be_answered_together_is_refused(fields: dict[str, Any], problem: str) -> None:
    preprocess = Preprocess("v1")
    [(_, failed)] = preprocess.play(submit("r", **fields))
    assert isinstance(failed, Failed) and problem in failed.message
    assert preprocess.holds_nothing
