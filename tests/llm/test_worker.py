"""What the language group tells whom, and in which order."""

import math
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from common.events import Event, PeerDown, PeerDraining, PeerUp, Received
from common.messages import (
    Abort,
    Alone,
    Cleared,
    Embeddings,
    Failed,
    ItemReceived,
    ItemRejected,
    LlmLoad,
    Noted,
    Reserved,
    Start,
    StopFound,
    Tokens,
)
from common.progress import Progress
from common.tracing import NO_TRACING
from common.wire import Tensor, encode
from compute.torch_tensors import to_wire
from services.llm.worker import COMPILED_SECONDS, Worker
from tests.llm.builders import create_prompt
from tests.llm.test_engine import (
    IMAGE,
    POISON,
    assert_nothing_is_held,
    create_engine,
    images,
    undisturbed,
)


class FakeLinks:
    def __init__(self) -> None:
        self.connected: list[tuple[str, str]] = []
        self.sent: list[tuple[str, Any]] = []

    def connect(self, peer: Any, role: str) -> None:
        self.connected.append((peer.id, role))

    def send(self, peer_id: str, message: msgspec.Struct) -> None:
        encode(message)
        self.sent.append((peer_id, message))


class FakeMember:
    """One batch of events a loop; the process is to stop when there are none left and the loop
    would wait."""

    def __init__(self, batches: tuple[list[Event], ...]) -> None:
        self.links = FakeLinks()
        self.batches = list(batches)
        self.num_loops = 0
        self.progress = Progress()
        self.tracing = NO_TRACING

    def track_load(self, load: Callable[[], tuple[int, int]]) -> None:
        self.load = load

    def take_events(self, wait: bool, timeout: float | None = None) -> list[Event] | None:
        self.num_loops += 1
        assert self.num_loops < 1000, "it steps though there is nothing to compute"
        if self.batches:
            return self.batches.pop(0)
        if timeout == COMPILED_SECONDS:  # it only looks whether a grammar is compiled
            time.sleep(timeout)
            return []
        return None if wait else []


def work(*batches: list[Event]) -> list[tuple[str, Any]]:
    """What is sent in answer to these events; nothing is held after them."""
    member: Any = FakeMember(batches)
    engine = create_engine()
    Worker(member, engine).run()
    assert_nothing_is_held(engine)
    assert set(member.links.connected) <= {("detokenizer", "detokenizer")}
    return member.links.sent


def prompt(request_id: str = "r", peer_id: str = "preprocess", **fields: Any) -> Received:
    return Received(peer_id, "preprocess", create_prompt(request_id, **fields))


def embeddings(
    request_id: str = "r", tensor: torch.Tensor | None = None, owner: str = "preprocess"
) -> Received:
    tensor = images() if tensor is None else tensor
    name = {
        "request_id": request_id,
        "attempt": 0,
        "item": 0,
        "mm_hash": "01" * 32,
        "preprocess_id": owner,
    }
    return Received(
        "vision", "vision", Embeddings(**name, embeddings=to_wire(tensor), encode_seconds=2.0)
    )


def abort(request_id: str = "r") -> Received:
    return Received("gateway", "gateway", Abort(request_id=request_id, attempt=0))


def answers(sent: list[tuple[str, Any]], request_id: str = "r") -> list[Any]:
    """What went to the detokenizer about a request."""
    return [
        message
        for peer_id, message in sent
        if peer_id == "detokenizer" and message.request_id == request_id
    ]


def test_an_answer_is_a_start_and_then_tokens_without_a_gap() -> None:
    start, *tokens = answers(work([prompt(max_tokens=5)]))
    assert isinstance(start, Start) and all(isinstance(t, Tokens) for t in tokens)
    assert [t.offset for t in tokens] == [0, 1, 2, 3, 4]
    assert [t.token_ids.numpy().tolist() for t in tokens] == [
        [token] for token in undisturbed(max_tokens=5)
    ]
    assert [t.finish_reason for t in tokens] == ["", "", "", "", "length"]


def test_the_start_names_the_gateway_and_tells_the_prompts_usage() -> None:
    start = answers(work([prompt(images=IMAGE, gateway_id="g7"), embeddings()]))[0]
    assert (start.gateway_id, start.usage.prompt_tokens, start.usage.image_tokens) == ("g7", 8, 5)
    assert b'"encode_seconds":2.0' in start.timings.bytes()
    assert b'"replica":"vision"' in start.timings.bytes()


def test_the_detokenizer_is_connected_to_before_anything_is_sent() -> None:
    member: Any = FakeMember(([prompt()],))
    Worker(member, create_engine()).run()
    assert member.links.connected == [("detokenizer", "detokenizer")]


def test_the_credits_are_the_free_places_in_a_step() -> None:
    member: Any = FakeMember(([prompt(images=IMAGE)],))  # its embeddings never come
    engine = create_engine()
    Worker(member, engine).run()
    assert member.credits == engine.scheduler.max_num_seqs - 1


def test_an_image_is_acknowledged_to_the_peer_that_brought_its_prompt() -> None:
    sent = work([prompt(peer_id="p2", images=IMAGE), embeddings(owner="p3")])
    assert [(peer, m.request_id, m.item) for peer, m in sent if isinstance(m, ItemReceived)] == [
        ("p2", "r", 0)
    ]
    assert len(answers(sent)) == 5


def test_an_image_is_not_acknowledged_before_its_prompt_is_there() -> None:
    assert work([embeddings()]) == []


def test_bad_embeddings_are_refused_and_the_next_ones_taken() -> None:
    bad = embeddings(tensor=torch.full((5, 2), math.nan))
    sent = work([prompt(images=IMAGE)], [bad], [embeddings()])
    reserved, rejected, taken = [message for peer, message in sent if peer == "preprocess"]
    assert (
        isinstance(reserved, Reserved)
        and isinstance(rejected, ItemRejected)
        and isinstance(taken, ItemReceived)
    )
    assert "not finite" in rejected.reason
    assert answers(sent)[-1].finish_reason == "length"


def test_an_image_of_a_request_that_ended_is_acknowledged_and_dropped() -> None:
    sent = work([prompt()], [], [], [], [], [embeddings()])
    assert [(peer, type(m)) for peer, m in sent if peer != "detokenizer"] == [
        ("preprocess", ItemReceived)
    ]


def test_a_request_that_fails_says_so_once_after_its_start() -> None:
    sent = work([prompt("bad", token_ids=[1, POISON]), prompt("good")])
    start, failed = answers(sent, "bad")
    assert isinstance(start, Start) and isinstance(failed, Failed) and failed.stage == "llm"
    assert answers(sent, "good")[-1].finish_reason == "length"


def test_an_abort_after_the_start_reaches_the_detokenizer_and_nothing_follows_it() -> None:
    messages = answers(work([prompt(max_tokens=20)], [], [abort()]))
    assert [type(m) for m in messages] == [Start, Tokens, Tokens, Abort]


def test_an_abort_before_the_start_does_not_trouble_the_detokenizer() -> None:
    assert answers(work([prompt(images=IMAGE)], [abort()], [embeddings()])) == []


def test_an_abort_that_overtakes_its_prompt_cancels_it() -> None:
    assert answers(work([abort()], [prompt()])) == []


def test_a_stop_string_ends_the_request_without_another_word() -> None:
    found = Received("detokenizer", "detokenizer", StopFound(request_id="r", attempt=0))
    assert [type(m) for m in answers(work([prompt(max_tokens=20)], [found]))] == [Start, Tokens]


def test_a_gateways_death_ends_its_answers_only() -> None:
    sent = work(
        [prompt("a", gateway_id="g1", max_tokens=20), prompt("b")],
        [PeerDown("g1", "gateway", "killed")],
    )
    assert [type(m) for m in answers(sent, "a")] == [Start, Tokens, Abort]
    assert answers(sent, "b")[-1].finish_reason == "length"


def test_the_death_of_a_vision_replica_ends_nothing() -> None:
    sent = work(
        [prompt(images=IMAGE)],
        [PeerUp("vision", "vision"), PeerDown("vision", "vision", "killed")],
        [embeddings()],
    )
    assert answers(sent)[-1].finish_reason == "length"


def test_it_waits_for_messages_where_nothing_can_be_computed_and_not_where_something_can() -> None:
    member: Any = FakeMember(([prompt(max_tokens=4)],))
    Worker(member, create_engine()).run()
    assert member.num_loops == 6, (
        "one for the prompt, three for decodes, one that finds nothing, one that waits"
    )


def test_a_prompt_of_several_steps_goes_on_though_no_message_comes() -> None:
    assert answers(work([prompt(num_tokens=40)]))[-1].finish_reason == "length"


def test_logprobs_travel_with_their_tokens() -> None:
    tokens = answers(work([prompt(sampling={"num_logprobs": 2}), prompt("plain")]))[1]
    assert tokens.logprobs.shape == (
        1,
    ) and tokens.top_token_ids.shape == tokens.top_logprobs.shape == (1, 2)
    assert answers(work([prompt()]))[1].logprobs is None


def test_a_prompt_that_cannot_be_taken_is_refused_to_its_gateway_and_the_next_one_answered() -> (
    None
):
    sent = work([prompt("huge", num_tokens=10_000), prompt("r")])
    (refusal,) = [message for peer, message in sent if peer == "gateway"]
    assert (
        isinstance(refusal, Failed)
        and refusal.request_id == "huge"
        and "do not fit" in refusal.message
    )
    assert answers(sent, "r")


def test_a_resumed_answer_starts_anew_at_the_detokenizer_with_what_was_delivered() -> None:
    whole = undisturbed()
    resumed = msgspec.structs.replace(
        create_prompt(), output_token_ids=Tensor.of(np.array(whole[:2], np.int64))
    )
    start, *rest = answers(work([Received("preprocess", "preprocess", resumed)]))
    assert isinstance(start, Start) and start.output_token_ids.numpy().tolist() == whole[:2]
    assert [(message.offset, message.token_ids.numpy().tolist()) for message in rest] == [
        (2, whole[2:3]),
        (3, whole[3:4]),
    ]


def test_the_detokenizer_hears_of_the_answers_that_end_with_their_gateway() -> None:
    """It may be connected to that gateway still: only this side was frozen for a while."""
    sent = work([prompt("r", max_tokens=10)], [PeerDown("gateway", "gateway", "gone")])
    assert [
        message.request_id
        for peer, message in sent
        if peer == "detokenizer" and isinstance(message, Abort)
    ] == ["r"]


def test_a_lost_detokenizer_is_told_to_the_gateways_whose_answers_it_would_have_got() -> None:
    """Their own connections to it may stand, and then nobody else would tell them."""
    events: list[Event] = [
        prompt("r", max_tokens=10, gateway_id="g1"),
        prompt("waits", images=IMAGE, gateway_id="g2"),
    ]
    sent = work(events, [PeerDown("detokenizer", "detokenizer", "killed")])
    told = [(peer, message) for peer, message in sent if isinstance(message, Failed)]
    assert [(peer, m.request_id, m.code, m.stage) for peer, m in told] == [
        ("g1", "r", "Unavailable", "detokenizer"),
        ("g2", "waits", "Unavailable", "detokenizer"),
    ]
    assert [type(m) for m in answers(sent)] == [Start, Tokens], "and nothing follows"


def test_a_rank_that_is_to_leave_drains_the_group() -> None:
    drained: list[str] = []
    member: Any = FakeMember(
        ([PeerDraining("llm.1", "llm")], [PeerDraining("detokenizer", "detokenizer")])
    )
    ranks = frozenset({"llm.1"})
    Worker(member, create_engine(), lambda: drained.append("drained"), ranks).run()
    assert drained == ["drained"]


def from_gateway(message: Any) -> Received:
    return Received("gateway", "gateway", message)


def test_a_request_that_is_apart_is_reported_and_has_the_group_until_it_is_cleared() -> None:
    ids = {"request_id": "r", "attempt": 0}
    sent = work(
        [prompt("other", max_tokens=3), prompt("r", token_ids=[20, 21], max_tokens=2, apart=True)],
        [from_gateway(Noted(**ids))],
        [],
        [],
        [from_gateway(Cleared(**ids))],
    )
    assert sent[0] == ("gateway", Alone(**ids)), "before anything is computed"
    order = [message.request_id for _, message in sent if isinstance(message, Tokens)]
    assert order == ["r", "r", "other", "other", "other"]


@pytest.mark.parametrize(
    "event",
    [abort("r"), PeerDown("gateway", "gateway", "killed")],
    ids=["abort", "gateway's death"],
)
def test_a_request_that_ends_before_its_turn_gives_it_up(event: Event) -> None:
    sent = work(
        [
            prompt("r", token_ids=[20, 21], apart=True),
            prompt("other", gateway_id="g2", max_tokens=3),
        ],
        [event],
    )
    assert answers(sent, "r") == [] and answers(sent, "other")[-1].finish_reason == "length"


def test_gateways_and_preprocesses_get_the_load_and_detokenizers_do_not() -> None:
    roles = ("gateway", "preprocess", "detokenizer")
    sent = work([PeerUp(f"{role}-1", role) for role in roles])
    assert {peer for peer, message in sent if isinstance(message, LlmLoad)} == {
        "gateway-1",
        "preprocess-1",
    }
