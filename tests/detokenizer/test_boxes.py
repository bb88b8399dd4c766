"""The last delta of an answer carries the boxes that the whole answer marks."""

from dataclasses import replace
from typing import Any

import pytest

from common.boxes import Box, boxes_in, read_boxes
from common.events import PeerUp
from common.messages import Delta
from common.vocabulary.tiktoken import read_tiktoken
from services.detokenizer.worker import Worker
from tests.detokenizer.test_worker import Detokenizer, start, tokens
from tests.fakes import FakeMember
from tests.golden import GoldenCase
from tests.golden_vocabularies import QWEN

GOLDEN = GoldenCase("c_box_two_images", "qwen_vl")
MARKUP = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
PLAIN = read_tiktoken(GOLDEN.checkpoint / "qwen.tiktoken", QWEN)
VOCABULARY = replace(
    PLAIN, markup_ids=frozenset(GOLDEN.expected["special_tokens"][name] for name in MARKUP)
)


class BoxDetokenizer(Detokenizer):
    """A detokenizer of a model whose answers hold boxes."""

    def __init__(self) -> None:
        self.member = FakeMember()
        self.worker = Worker(self.member, VOCABULARY, VOCABULARY.size, 1000, reads_boxes=True)
        self.play([PeerUp("gateway-1", "gateway")])


def boxes_of(delta: Delta) -> list[Box]:
    assert delta.boxes is not None
    return read_boxes(delta.boxes)


@pytest.mark.parametrize("output", GOLDEN.expected["box_outputs"])
def test_the_text_keeps_the_markup_and_the_last_delta_has_the_boxes(output: dict[str, Any]) -> None:
    detokenizer = BoxDetokenizer()
    *ids, last = output["forced_ids"]
    one_by_one = [tokens(offset, [token_id]) for offset, token_id in enumerate(ids)]
    detokenizer.play(start(), *one_by_one, tokens(len(ids), [last], "stop"))
    assert detokenizer.text() == output["decode_skip_special_keep_image_special"]
    *others, end = detokenizer.deltas
    assert boxes_of(end) == boxes_in(output["decode_all"])
    assert all(delta.boxes is None for delta in others)


def test_boxes_are_those_of_all_attempts() -> None:
    output = GOLDEN.expected["box_outputs"][0]
    ids = output["forced_ids"]
    detokenizer = BoxDetokenizer()
    again = start(attempt=1)
    again[0].message.output_token_ids = tokens(0, ids[:20])[0].message.token_ids
    detokenizer.play(again, tokens(20, ids[20:], "stop", attempt=1))
    assert boxes_of(detokenizer.deltas[-1]) == boxes_in(output["decode_all"])


def test_a_box_behind_a_stop_string_is_none_of_the_answer() -> None:
    ids = GOLDEN.expected["box_outputs"][0]["forced_ids"]
    detokenizer = BoxDetokenizer()
    detokenizer.play(start(stop=("</box> and",)), tokens(0, ids))
    assert boxes_of(detokenizer.deltas[-1]) == []


def test_other_models_answers_have_no_boxes() -> None:
    detokenizer = Detokenizer("gateway-1")
    detokenizer.play(start(), tokens(0, [5], "stop"))
    assert detokenizer.deltas[-1].boxes is None
