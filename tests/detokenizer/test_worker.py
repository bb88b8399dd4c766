"""The detokenizer worker turns tokens into deltas, and each answer ends once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.events import Event, PeerDown, PeerUp
from common.member import Drain
from common.messages import (
    Abort,
    Delta,
    Failed,
    Released,
    RequestKey,
    Start,
    StopFound,
    Stopping,
    Tokens,
    Usage,
)
from common.vocabulary.tokenizer_json import read_tokenizer_json
from common.wire import Tensor
from services.detokenizer.metrics import DetokenizerMetrics
from services.detokenizer.worker import Answer, Worker
from tests.fakes import FakeMember, received

VOCABULARY = read_tokenizer_json(
    Path(__file__).parents[1]
    / "golden"
    / "qwen2_5_vl"
    / "a_image"
    / "checkpoint"
    / "tokenizer.json"
)
MAX_MODEL_LEN = 1000
BY_BYTES = {data: id for id, data in VOCABULARY.bytes_by_id.items()}


class Detokenizer:
    """A worker to which these gateways are connected."""

    def __init__(self, *gateways: str) -> None:
        self.member = FakeMember()
        self.metrics = DetokenizerMetrics()
        self.worker = Worker(
            self.member, VOCABULARY, VOCABULARY.size, MAX_MODEL_LEN, metrics=self.metrics
        )
        self.play([PeerUp(gateway, "gateway") for gateway in gateways])

    @property
    def answers(self) -> dict[RequestKey, Answer]:
        return self.worker._answers

    @property
    def awaited(self) -> set[str]:
        return self.worker._unreleased

    def play(self, *batches: list[Event]) -> None:
        self.member.play(self.worker, *batches)

    @property
    def deltas(self) -> list[Delta]:
        return self.member.links.of(Delta)

    def text(self, request_id: str = "r", attempt: int = 0) -> str:
        return "".join(
            d.text.text() for d in self.deltas if (d.request_id, d.attempt) == (request_id, attempt)
        )


def ids_of(text: str) -> list[int]:
    return [BY_BYTES[bytes([byte])] for byte in text.encode()]


def start(
    request_id: str = "r",
    attempt: int = 0,
    gateway: str = "gateway-1",
    llm: str = "llm-1",
    **stopping: Any,
) -> list[Event]:
    message = Start(
        request_id=request_id,
        attempt=attempt,
        gateway_id=gateway,
        stopping=Stopping(**stopping),
        usage=Usage(prompt_tokens=9, image_tokens=4, cached_tokens=2),
        timings=Tensor.of_text(json.dumps({"prefill_seconds": 0.5, "images": []})),
    )
    return received(llm, "llm", message)


def tokens(
    offset: int,
    ids: Sequence[int],
    finish_reason: str = "",
    request_id: str = "r",
    attempt: int = 0,
    logprobs: bool = False,
) -> list[Event]:
    """Return tokens with log-probability -id/1000, whose best candidate is always "a"."""
    of = np.array(ids, np.int64)
    told = {
        "logprobs": Tensor.of((-of / 1000).astype(np.float32)),
        "top_token_ids": Tensor.of(np.full((len(ids), 1), ids_of("a")[0], np.int64)),
        "top_logprobs": Tensor.of(np.full((len(ids), 1), -0.5, np.float32)),
    }
    name = {"request_id": request_id, "attempt": attempt}
    message = Tokens(
        **name,
        offset=offset,
        token_ids=Tensor.of(of),
        finish_reason=finish_reason,
        **told if logprobs else {},
    )
    return received("llm-1", "llm", message)


def named(kind: type, llm: str = "llm-1", attempt: int = 0, **fields: Any) -> list[Event]:
    return received(llm, "llm", kind(request_id="r", attempt=attempt, **fields))


def test_deltas_follow_the_tokens_and_their_texts_join_to_the_whole() -> None:
    detokenizer = Detokenizer("gateway-1", "gateway-2")
    ids = ids_of("é is 😀!")
    detokenizer.play(
        start(),
        *[tokens(i, [id]) for i, id in enumerate(ids[:-1])],
        tokens(len(ids) - 1, ids[-1:], "length"),
    )
    assert [(d.offset, d.token_ids.numpy().tolist()) for d in detokenizer.deltas] == [
        (i, [id]) for i, id in enumerate(ids)
    ]
    assert {receiver for receiver, _ in detokenizer.member.links.sent} == {"gateway-1"}
    assert detokenizer.text() == "é is 😀!"
    assert detokenizer.deltas[0].text.text() == "", "half a character is held back"


def test_only_the_last_delta_carries_the_end_and_only_it_and_the_first_carry_more() -> None:
    detokenizer = Detokenizer("gateway-1", "gateway-2")
    detokenizer.play(
        start(),
        tokens(0, ids_of("a")),
        tokens(1, ids_of("b")),
        tokens(2, ids_of("c"), "length"),
        tokens(3, ids_of("d"), "length"),
    )
    first, second, last = detokenizer.deltas
    assert (first.finish_reason, first.usage) == (
        "",
        Usage(prompt_tokens=9, image_tokens=4, cached_tokens=2),
    )
    assert first.timings is not None
    assert json.loads(first.timings.bytes()) == {"prefill_seconds": 0.5, "images": []}
    assert (second.finish_reason, second.usage, second.timings) == ("", Usage(), None)
    assert last.finish_reason == "length"
    assert last.usage == Usage(
        prompt_tokens=9, image_tokens=4, completion_tokens=3, cached_tokens=2
    )
    assert last.timings is not None
    timings = json.loads(last.timings.bytes())
    assert timings.pop("decode_seconds") >= 0
    assert timings == {"prefill_seconds": 0.5, "images": []}
    assert not detokenizer.answers


def test_text_that_was_held_back_comes_with_the_end() -> None:
    detokenizer = Detokenizer("gateway-1", "gateway-2")
    detokenizer.play(
        start(stop=("END",)), tokens(0, ids_of("abEN")), tokens(4, ids_of("😀")[:2], "length")
    )
    assert detokenizer.text() == "abEN\ufffd"


def test_a_stop_string_ends_the_answer_here_and_at_the_language_group() -> None:
    detokenizer = Detokenizer("gateway-1", "gateway-2")
    detokenizer.play(
        start(stop=("END",)),
        tokens(0, ids_of("ab EN")),
        tokens(5, ids_of("D more")),
        tokens(11, ids_of("x"), "length"),
    )
    assert detokenizer.text() == "ab "
    last = detokenizer.deltas[-1]
    assert (last.finish_reason, last.offset, last.token_ids.numpy().tolist()) == (
        "stop",
        5,
        ids_of("D"),
    )
    assert last.usage.completion_tokens == 6
    assert len(detokenizer.deltas) == 2, "what comes after the end is dropped"
    assert [m.request_id for m in detokenizer.member.links.to("llm-1")] == ["r"]
    assert len(detokenizer.member.links.of(StopFound)) == 1
    assert not detokenizer.answers


def test_a_stop_string_in_the_last_token_wins_without_a_message_to_the_group() -> None:
    detokenizer = Detokenizer("gateway-1", "gateway-2")
    detokenizer.play(start(stop=("END",)), tokens(0, ids_of("aEND"), "length"))
    [last] = detokenizer.deltas
    assert (last.finish_reason, last.text.text()) == ("stop", "a")
    assert not detokenizer.member.links.of(StopFound)


@pytest.mark.parametrize("include", [False, True])
def test_the_text_of_a_stop_token_belongs_to_the_answer_only_if_asked(include: bool) -> None:
    detokenizer = Detokenizer("gateway-1")
    ids = ids_of("a;;")
    stopping = {"stop_token_ids": tuple(ids[1:2]), "include_stop": include, "min_tokens": 2}
    detokenizer.play(start(**stopping), tokens(0, ids, finish_reason="stop"))
    assert detokenizer.text() == ("a;;" if include else "a;")
    [delta] = detokenizer.deltas
    assert delta.token_ids.numpy().tolist() == ids


@pytest.mark.parametrize("include", [False, True])
def test_the_end_token_belongs_to_the_text_only_if_asked(include: bool) -> None:
    detokenizer = Detokenizer("gateway-1")
    end = min(VOCABULARY.special_ids)
    stopping = {"skip_special_tokens": False, "include_stop": include}
    detokenizer.play(start(**stopping), tokens(0, [*ids_of("a"), end], finish_reason="stop"))
    name = VOCABULARY.bytes_by_id[end].decode()
    assert detokenizer.text() == ("a" + name if include else "a")


def test_a_stop_token_that_does_not_end_the_answer_is_text() -> None:
    detokenizer = Detokenizer("gateway-1")
    ids = ids_of("a;")
    detokenizer.play(start(stop_token_ids=(ids[1],)), tokens(0, ids, finish_reason="length"))
    assert detokenizer.text() == "a;"


def test_there_is_one_logprobs_entry_for_each_token_also_after_a_stop() -> None:
    detokenizer = Detokenizer("gateway-1", "gateway-2")
    ids = ids_of("xEND")
    detokenizer.play(start(stop=("END",)), tokens(0, [*ids, *ids_of("more")], logprobs=True))
    [delta] = detokenizer.deltas
    assert delta.logprobs is not None
    entries = json.loads(delta.logprobs.bytes())
    assert [e["token_id"] for e in entries] == delta.token_ids.numpy().tolist() == ids
    assert [e["token"] for e in entries] == list("xEND")
    assert [e["logprob"] for e in entries] == pytest.approx([-id / 1000 for id in ids])
    [candidate] = entries[1]["top_logprobs"]
    assert (candidate["token"], candidate["token_id"], candidate["logprob"]) == (
        "a",
        ids_of("a")[0],
        -0.5,
    )


def test_without_logprobs_there_are_none() -> None:
    detokenizer = Detokenizer("gateway-1", "gateway-2")
    detokenizer.play(start(), tokens(0, ids_of("a")))
    assert [d.logprobs for d in detokenizer.deltas] == [None]


def test_a_failure_of_the_language_group_is_passed_on_as_the_end() -> None:
    detokenizer = Detokenizer("gateway-1", "gateway-2")
    failure = named(Failed, code="Internal", message="no numbers", stage="llm")
    detokenizer.play(start(), tokens(0, ids_of("a")), failure, failure, tokens(1, ids_of("b")))
    assert [message for _, message in detokenizer.member.links.sent[1:]] == [failure[0].message]
    assert detokenizer.member.links.sent[1][0] == "gateway-1"
    assert not detokenizer.answers


@pytest.mark.parametrize(
    "event",
    [named(Abort), [PeerDown("llm-1", "llm", "gone")], [PeerDown("gateway-1", "gateway", "gone")]],
    ids=["abort", "llm", "gateway"],
)
def test_an_answer_whose_group_or_gateway_is_gone_is_freed_and_no_other(
    event: list[Event],
) -> None:
    detokenizer = Detokenizer("gateway-1", "gateway-2")
    detokenizer.play(
        start(), start("other", gateway="gateway-2", llm="llm-2"), event, tokens(0, ids_of("a"))
    )
    assert list(detokenizer.answers) == [("other", 0)]
    assert detokenizer.deltas == []


def test_attempts_of_one_request_are_separate() -> None:
    detokenizer = Detokenizer("gateway-1", "gateway-2")
    detokenizer.play(
        start(),
        tokens(0, ids_of("é")[:1]),
        start(attempt=1),
        tokens(0, ids_of("b"), attempt=1),
        named(Abort),
    )
    assert list(detokenizer.answers) == [("r", 1)]
    assert (detokenizer.text(), detokenizer.text(attempt=1)) == ("", "b")
    detokenizer.play(tokens(1, ids_of("c"), "length", attempt=1))
    assert detokenizer.text(attempt=1) == "bc" and not detokenizer.answers


def test_tokens_before_any_start_are_dropped() -> None:
    detokenizer = Detokenizer("gateway-1", "gateway-2")
    detokenizer.play(tokens(0, ids_of("a"), "length"), named(Abort))
    assert detokenizer.member.links.sent == []


@pytest.mark.parametrize("num_delivered", range(1, 9))
def test_an_answer_continues_at_another_detokenizer_without_a_difference(
    num_delivered: int,
) -> None:
    """The change may cut a character, and a stop string may begin before it."""
    ids = ids_of("a\u00e9b\u20acSTOP and more")
    whole = Detokenizer("gateway-1", "gateway-2")
    whole.play(start(stop=("STOP",)), *[tokens(n, [token]) for n, token in enumerate(ids)])
    first = Detokenizer("gateway-1", "gateway-2")
    second = Detokenizer("gateway-1", "gateway-2")
    first.play(
        start(stop=("STOP",)), *[tokens(n, [token]) for n, token in enumerate(ids[:num_delivered])]
    )
    [begun] = start(attempt=1, stop=("STOP",))
    begun.message.output_token_ids = Tensor.of(np.array(ids[:num_delivered], np.int64))
    second.play(
        [begun],
        *[tokens(n, [token], attempt=1) for n, token in enumerate(ids) if n >= num_delivered],
    )
    assert first.text() + second.text(attempt=1) == whole.text() == "a\u00e9b\u20ac"
    assert [d.offset for d in first.deltas + second.deltas] == [d.offset for d in whole.deltas]
    assert second.deltas[-1].usage == whole.deltas[-1].usage


def test_a_lost_language_group_is_reported_to_the_gateways_of_its_answers() -> None:
    """Their own connections to the group may stand. Then only the detokenizer notices."""
    detokenizer = Detokenizer("gateway-1", "gateway-2")
    detokenizer.play(
        start(),
        start("other", gateway="gateway-2", llm="llm-2"),
        [PeerDown("llm-1", "llm", "gone")],
    )
    (failed,) = detokenizer.member.links.to("gateway-1")
    assert isinstance(failed, Failed) and (failed.code, failed.stage, failed.item) == (
        "Unavailable",
        "llm",
        None,
    )
    assert detokenizer.member.links.to("gateway-2") == []


def test_a_draining_detokenizer_waits_until_every_gateway_has_released_it() -> None:
    detokenizer = Detokenizer()
    detokenizer.play(
        [
            PeerUp("gateway-1", "gateway"),
            PeerUp("gateway-2", "gateway"),
            PeerUp("gateway-3", "gateway"),
            PeerUp("llm-1", "llm"),
        ]
    )
    assert detokenizer.awaited == set(), "it is no work while nobody asks it to leave"
    detokenizer.play(
        [Drain()],
        received("gateway-1", "gateway", Released()),
        [PeerDown("gateway-2", "gateway", "gone")],
    )
    assert detokenizer.awaited == {"gateway-3"}
    detokenizer.play([PeerUp("gateway-4", "gateway")])
    assert detokenizer.awaited == {"gateway-3", "gateway-4"}


def test_tokens_and_the_time_that_they_take_are_counted() -> None:
    detokenizer = Detokenizer("gateway-1")
    detokenizer.play(start(), tokens(0, ids_of("ab")), tokens(2, ids_of("c"), "length"))
    read = detokenizer.metrics.registry.get_sample_value
    assert read("twinlens_detokenizer_tokens_total") == 3
    assert (read("twinlens_detokenizer_busy_seconds_total") or 0) > 0
