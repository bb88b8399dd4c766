"""No message of any peer ends preprocess, or touches what belongs to another peer."""

import json
from typing import Any

import numpy as np
import pytest

from common.errors import BY_CODE, InvalidRequest
from common.events import Event, PeerUp
from common.messages import (
    Abort,
    CacheHit,
    Grant,
    Item,
    ItemReceived,
    ItemRejected,
    Pixels,
    Reserved,
    Stopping,
    Submit,
    VisionLoad,
)
from common.wire import Tensor
from services.preprocess.sandbox.jobs import Read
from tests.fakes import received
from tests.preprocess.builders import (
    IMAGES,
    PREPROCESSOR,
    Preprocess,
    arrived,
    failures,
    grant,
    joins,
    offers,
    prompts,
    reserved,
    submit,
)
from tests.preprocess.cases import encoded, noise

VOCAB_SIZE = PREPROCESSOR.vocab_size
IDS = {"request_id": "r", "attempt": 0}


def changed(event: Event, **fields: Any) -> list[Event]:
    """The Submit of an event with other fields."""
    message = event.message
    values = {name: getattr(message, name) for name in message.__struct_fields__}
    return received(event.peer_id, event.role, Submit(**(values | fields)))


def vector(*numbers: int) -> Tensor:
    return Tensor.of(np.array(numbers, np.int64))


MALFORMED: list[dict[str, Any]] = [
    {"prompt": Tensor.of_bytes(b"")},
    {"prompt": Tensor.of_bytes(b"{no json")},
    {"prompt": Tensor.of_bytes(b"\xff\xfe")},
    {"prompt": Tensor.of_bytes(b"[" * 100_000)},
    {"prompt": Tensor.of_bytes(json.dumps([{"role": "user", "content": 3}]).encode())},
    {"prompt": vector(1, 2)},
    {"prompt": Tensor.of(np.zeros((2, 2), np.uint8))},
    {"prompt_kind": "token_ids", "prompt": Tensor.of_bytes(b"12345678")},
    {"prompt_kind": "token_ids", "prompt": vector()},
    {"prompt_kind": "token_ids", "prompt": vector(VOCAB_SIZE)},
    {"prompt_kind": "token_ids", "prompt": vector(-1)},
    {"prompt_kind": "token_ids", "prompt": Tensor.of(np.zeros((1, 4), np.int64))},
    {"prompt_kind": "token_ids", "prompt": Tensor.of(np.zeros(5000, np.int64))},
    {"prompt_kind": "telepathy"},
    {"items": (Item("image", vector(1)),)},
    {"guide_kind": "json_schema"},
    {"guide_kind": "json_schema", "guide": Tensor.of_bytes(b"\xff")},
    {"guide_kind": "json_schema", "guide": Tensor.of_bytes(b"[" * 100_000)},
    {"guide_kind": "regex", "guide": vector(1)},
    {"output_token_ids": Tensor.of_bytes(b"x")},
    {"output_token_ids": vector(VOCAB_SIZE)},
    {"output_token_ids": Tensor.of(np.zeros(5000, np.int64))},
    {"stopping": Stopping(stop_token_ids=(VOCAB_SIZE,))},
]


@pytest.mark.parametrize("fields", MALFORMED, ids=str)
def test_a_malformed_request_is_refused_and_the_next_one_is_served(fields: dict[str, Any]) -> None:
    preprocess = Preprocess("vision-1")
    [event] = submit("bad")
    sent = preprocess.play(changed(event, **fields) + submit("next"))
    [(gateway, request, code, item)] = failures(sent)
    assert (gateway, request, item) == ("gateway-1", "bad", None)
    assert issubclass(BY_CODE[code], InvalidRequest)
    assert len(sent[0][1].message) < 500
    assert prompts(sent) == ["next"] and preprocess.holds_nothing


def test_an_event_that_cannot_be_handled_fails_its_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preprocess = Preprocess("vision-1")
    preprocess.play(submit("r", IMAGES[0]), submit("other", IMAGES[1]))
    worker: Any = preprocess.worker
    monkeypatch.setattr(worker._dispatcher, "_start_items", lambda _: 1 / 0)
    assert failures(preprocess.play(reserved("r"))) == [("gateway-1", "r", "Internal", None)]
    monkeypatch.undo()
    assert list(preprocess.handovers) == [("other", 0)]
    assert offers(preprocess.play(reserved("other"))) == [("vision-1", 0)]


def test_a_request_that_comes_twice_is_prepared_once() -> None:
    preprocess = Preprocess("vision-1")
    sent = preprocess.play(submit("r", IMAGES[0]), submit("r", IMAGES[1]))
    assert prompts(sent) == ["r"] and failures(sent) == []
    assert prompts(preprocess.play(submit("r", IMAGES[1]))) == []
    assert len(preprocess.handovers) == 1


def test_a_gateway_cannot_take_the_request_id_of_another_one() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.play(submit("r", IMAGES[0]))
    sent = preprocess.play(submit("r", IMAGES[1], gateway="gateway-2"))
    assert failures(sent) == [("gateway-2", "r", "InvalidRequest", None)]
    assert preprocess.handovers["r", 0].gateway_id == "gateway-1"


def test_a_gateway_cannot_abort_the_request_of_another_one() -> None:
    preprocess = Preprocess("vision-1")
    foreign = received("gateway-2", "gateway", Abort(**IDS))
    assert prompts(preprocess.play(submit("r", IMAGES[0]), foreign)) == ["r"]
    assert preprocess.play(foreign) == [] and list(preprocess.handovers) == [("r", 0)]


@pytest.mark.parametrize(
    "message",
    [
        Reserved(**IDS),
        ItemReceived(**IDS, item=0),
        ItemRejected(**IDS, item=0, reason="it is not mine"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_language_group_without_the_prompt_decides_nothing(message: Any) -> None:
    preprocess = Preprocess("vision-1")
    other = [PeerUp("llm-2", "llm", "ipc:///llm-2")]
    preprocess.play(submit("r", IMAGES[0]))
    assert preprocess.play(other, received("llm-2", "llm", message)) == []
    assert offers(preprocess.play(reserved("r"))) == [("vision-1", 0)]
    preprocess.play(grant("vision-1", 0))
    assert preprocess.play(received("llm-2", "llm", message)) == []
    assert list(preprocess.handovers) == [("r", 0)]
    preprocess.play(arrived(0))
    assert preprocess.holds_nothing


@pytest.mark.parametrize("kind", [Grant, CacheHit])
def test_a_replica_that_was_not_offered_an_item_gets_no_pixels(kind: Any) -> None:
    preprocess = Preprocess("vision-1", "vision-2")
    [(first, _)] = offers(preprocess.dispatch("r", IMAGES[0]))
    [other] = {"vision-1", "vision-2"} - {first}
    assert preprocess.play(received(other, "vision", kind(**IDS, item=0))) == []
    sent = preprocess.play(grant(first, 0), grant(first, 0))
    assert [receiver for receiver, m in sent if isinstance(m, Pixels)] == [first]


@pytest.mark.parametrize(
    "load",
    [
        VisionLoad(buckets=(0, 64)),
        VisionLoad(buckets=(64, 32)),
        VisionLoad(sizes=(16,), seconds=()),
        VisionLoad(sizes=(0,), seconds=(0.1,)),
    ],
    ids=str,
)
def test_a_report_that_makes_no_sense_changes_nothing(load: VisionLoad) -> None:
    preprocess = Preprocess("vision-1", buckets=(16, 64))
    worker: Any = preprocess.worker
    preprocess.play(received("vision-1", "vision", load))
    assert worker._pool.buckets == (16, 64)
    preprocess.play(joins("vision-1", (16, 128)))
    assert worker._pool.buckets == (16, 128)


def test_images_that_cannot_fit_are_refused_before_one_is_decoded() -> None:
    preprocess = Preprocess("vision-1")
    large = encoded(noise(1300, 1300), "JPEG")
    sent = preprocess.play(submit("r", large, large, large))
    assert failures(sent) == [("gateway-1", "r", "ContextLengthExceeded", None)]
    assert "maximum context length is 4096" in sent[0][1].message
    assert [type(task.job) for task in preprocess.tasks.started] == [Read]
