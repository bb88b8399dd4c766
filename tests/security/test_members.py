"""A member that sends one well-framed message with wrong contents ends nothing.

Each attack is one message to a work loop. The loop goes on, an innocent request is answered, and
nothing of the attack is held.
"""

import json
import time
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from common.checkpoint import open_checkpoint
from common.connections import Connections
from common.events import Event, PeerDown, PeerDraining, PeerUp, Received
from common.item_hash import item_hash
from common.member import Member
from common.messages import (
    HOPS,
    MAX_TEXT_CHARS,
    Abort,
    Busy,
    CacheHit,
    ExecuteStep,
    Failed,
    Goodbye,
    Grant,
    HandedOver,
    Hello,
    ItemReceived,
    ItemRejected,
    ItemsLeft,
    Offer,
    Peer,
    Pixels,
    Prompt,
    Reserved,
    Sampling,
    StopFound,
    Tokens,
)
from common.progress import Progress
from common.wire import Tensor, decode, encode
from services.detokenizer import worker as detokenizer_worker
from services.gateway import peers as gateway_peers
from services.gateway.generation import Ended
from services.llm import worker as llm_worker
from services.llm.ranks import StepLimits, check_step, follow, lead, to_message
from services.llm.worker import Worker
from services.vision.item_rules import ItemRules
from services.vision.worker import MAX_JOINED
from tests.detokenizer.test_worker import Detokenizer, ids_of, start, tokens
from tests.fakes import received
from tests.gateway.builders import Gateway, delta, error_of, request, rest, routed
from tests.golden import GoldenCase
from tests.llm import test_ranks, test_worker
from tests.llm.builders import create_prompt
from tests.llm.test_engine import IMAGE, assert_nothing_is_held, create_engine, undisturbed
from tests.vision.test_worker import LLM, Replica

replace = msgspec.structs.replace

# The language group


def int64(*values: int) -> Tensor:
    return Tensor.of(np.array(values, np.int64))


def on_wire(message: Any, sender: str, receiver: str) -> Any:
    """Return what the receiver decodes, because an attack must be well-framed."""
    return decode(encode(message), HOPS[sender, receiver])


PLAIN = create_prompt("bad")
PICTURE = create_prompt("bad", images=IMAGE)
BAD_PROMPTS: dict[str, Prompt] = {
    "no sampling": replace(PLAIN, sampling=Sampling()),
    "half a sampling": replace(PLAIN, sampling=replace(PLAIN.sampling, top_k=None)),
    "no max_tokens": replace(PLAIN, stopping=replace(PLAIN.stopping, max_tokens=None)),
    "max_tokens beyond the context": replace(
        PLAIN, stopping=replace(PLAIN.stopping, max_tokens=2**40)
    ),
    "a stop id outside the vocabulary": replace(
        PLAIN, stopping=replace(PLAIN.stopping, stop_token_ids=(2**48,))
    ),
    "timings no JSON": replace(PLAIN, timings=Tensor.of_text("{")),
    "timings no object": replace(PLAIN, timings=Tensor.of_text("[]")),
    "timings no UTF-8": replace(PLAIN, timings=Tensor.of_bytes(b"\xff")),
    "timings deep": replace(PLAIN, timings=Tensor.of_text('{"x": ' + "[" * 60_000)),
    "timings large": replace(PLAIN, timings=Tensor.of_text("{}" + " " * 100_000)),
    "timings of strings": replace(PLAIN, timings=Tensor.of_text('{"preprocess_seconds": "x"}')),
    "timings of no image": replace(PICTURE, timings=Tensor.of_text('{"images": []}')),
    "timings of numbers": replace(PICTURE, timings=Tensor.of_text('{"images": [3]}')),
    "timings as int64": replace(PLAIN, timings=int64(3)),
    "grammar no UTF-8": replace(PLAIN, grammar=Tensor.of_bytes(b"\xff\xfe")),
    "grammar that does not compile": replace(PLAIN, grammar=Tensor.of_text("garbage")),
    "grammar empty": replace(PLAIN, grammar=Tensor.of_bytes(b"")),
    "grammar large": replace(PLAIN, grammar=Tensor.of_bytes(b"x" * 2**21)),
    "no tokens": replace(PLAIN, token_ids=int64(), positions=Tensor.of(np.zeros((3, 0), np.int64))),
    "token ids of 0 dimensions": replace(PLAIN, token_ids=Tensor.of(np.array(3))),
    "token ids as float32": replace(PLAIN, token_ids=Tensor.of(np.ones(8, np.float32))),
    "a negative token id": replace(PLAIN, token_ids=int64(1, 2, 3, 4, 5, 6, 7, -1)),
    "a token id beyond the vocabulary": replace(PLAIN, token_ids=int64(*range(44, 52))),
    "other positions": replace(PLAIN, positions=Tensor.of(np.zeros((2, 8), np.int64))),
    "negative positions": replace(PLAIN, positions=Tensor.of(np.full((3, 8), -1))),
    "positions beyond the context": replace(PLAIN, positions=Tensor.of(np.full((3, 8), 2**40))),
    "rope_delta below": replace(PLAIN, rope_delta=-(2**48)),
    "rope_delta above": replace(PLAIN, rope_delta=2**48),
    "rope_parameter": replace(PLAIN, rope_parameter=2**48),
    "adapter": replace(PLAIN, adapter="unknown"),
    "placeholders that overlap": replace(
        create_prompt("bad", images=((1, 3, 1), (5, 2, 2))),
        placeholders=Tensor.of(np.array([[1, 3], [2, 2]])),
    ),
    "placeholders beyond int64": replace(
        PICTURE, placeholders=Tensor.of(np.array([[2, 2**63 - 1]]))
    ),
    "hashes of 31 bytes": replace(PICTURE, mm_hashes=Tensor.of(np.zeros((1, 31), np.uint8))),
    "output beyond the vocabulary": replace(PLAIN, output_token_ids=int64(50)),
    "output negative": replace(PLAIN, output_token_ids=int64(-1)),
    "output of two dimensions": replace(
        PLAIN, output_token_ids=Tensor.of(np.zeros((1, 1), np.int64))
    ),
    "output as long as max_tokens": replace(PLAIN, output_token_ids=int64(1, 1, 1, 1)),
    "detokenizer without an address": replace(PLAIN, detokenizer=Peer("d", "")),
    "detokenizer without an id": replace(PLAIN, detokenizer=Peer("", "tcp://127.0.0.1:1")),
    "detokenizer inproc": replace(PLAIN, detokenizer=Peer("d", "inproc://x")),
    "detokenizer without a path": replace(PLAIN, detokenizer=Peer("d", "ipc://")),
}


class LanguageGroup:
    """A worker of rank 0 that plays batches of events to their end."""

    def __init__(self, ranks: frozenset[str] = frozenset()) -> None:
        self.engine = create_engine()
        self.drained = 0
        self.ranks = ranks

    def play(self, *batches: list[Event]) -> list[tuple[str, Any]]:
        member: Any = test_worker.FakeMember(batches)
        Worker(member, self.engine, self._drain, self.ranks).run()
        assert_nothing_is_held(self.engine)
        assert self.engine.budget.num_free == self.engine.budget.num_tokens
        assert not self.engine.guided_decoding._matchers
        return member.links.sent

    def _drain(self) -> None:
        self.drained += 1


def with_vocabulary(group: LanguageGroup) -> LanguageGroup:
    """Let the group compile grammars."""
    from common.vocabulary import open_vocabulary

    vocabulary = open_vocabulary(open_checkpoint(GoldenCase("a_image").checkpoint))
    guided = group.engine.guided_decoding
    guided._read_vocabulary = lambda: vocabulary
    guided.vocab_size = vocabulary.size
    return group


def answer_of(sent: list[tuple[str, Any]], request_id: str = "innocent") -> list[int]:
    """Return the tokens of an answer that has its end."""
    found = [m for m in test_worker.answers(sent, request_id) if isinstance(m, Tokens)]
    assert found[-1].finish_reason == "length"
    return [token for message in found for token in message.token_ids.numpy().tolist()]


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_prompt_with_wrong_contents_is_refused_to_its_gateway_alone(name: str) -> None:
    group = LanguageGroup()
    if name.startswith("grammar that"):
        # The size of the fake model's vocabulary is not that of the tokenizer.
        with_vocabulary(group).engine.guided_decoding.vocab_size = 2**9
    bad = on_wire(BAD_PROMPTS[name], "preprocess", "llm")
    sent = group.play(
        [test_worker.prompt("early")],
        [Received("preprocess", "preprocess", bad)],
        [test_worker.prompt("innocent")],
    )
    assert answer_of(sent) == answer_of(sent, "early") == undisturbed()
    assert [(peer, type(m)) for peer, m in sent if m.request_id == "bad"] == [("gateway", Failed)]


@pytest.mark.parametrize("sender", ["preprocess", "another"])
def test_the_same_prompt_twice_leaves_no_ghost(sender: str) -> None:
    again = test_worker.prompt("innocent", sender, max_tokens=9)
    sent = LanguageGroup().play([test_worker.prompt("innocent"), again], [], [again])
    assert answer_of(sent) == undisturbed()
    assert not [m for _, m in sent if isinstance(m, Failed)]


def test_a_prompt_cannot_break_the_connection_of_a_peer_that_it_names() -> None:
    """This process would connect to that peer, and so end the peer's own connection."""
    bad = replace(PLAIN, detokenizer=Peer("victim", "tcp://127.0.0.1:1"))
    sent = LanguageGroup().play(
        [PeerUp("victim", "gateway")],
        received("preprocess", "preprocess", bad),
        [test_worker.prompt("innocent")],
    )
    assert answer_of(sent) == undisturbed()
    assert [m.request_id for _, m in sent if isinstance(m, Failed)] == ["bad"]


def test_the_requests_of_one_preprocess_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_worker, "MAX_REQUESTS_OF_A_PREPROCESS", 5)
    flood: list[Event] = [test_worker.prompt(f"bad {n}", "another") for n in range(50)]
    sent = LanguageGroup().play(flood, [test_worker.prompt("innocent")])
    assert answer_of(sent) == undisturbed()
    assert len([m for _, m in sent if isinstance(m, Failed)]) == 45


def sent_embeddings(**changes: Any) -> list[Event]:
    message = test_worker.embeddings("innocent").message
    bad = on_wire(replace(message, **changes), "vision", "llm")
    return received("vision", "vision", bad)


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("float32", (0,), b""),
        Tensor("float32", (0, 2), b""),
        Tensor("float32", (), b"1234"),
        Tensor.of(np.ones((5, 2), np.int64)),
        Tensor.of(np.ones((5, 2), np.uint8)),
        Tensor.of(np.ones((5, 3), np.float32)),
        Tensor.of(np.ones((2**10, 2), np.float32)),
        Tensor.of(np.full((5, 2), np.nan, np.float32)),
        Tensor.of(np.full((5, 2), np.inf, np.float16)),
    ],
    ids=repr,
)
def test_embeddings_with_wrong_contents_are_rejected_and_never_computed(tensor: Tensor) -> None:
    group = LanguageGroup()
    sent = group.play(
        [test_worker.prompt("innocent", images=IMAGE)],
        sent_embeddings(embeddings=tensor),
        sent_embeddings(),
    )
    assert answer_of(sent) == undisturbed(images=IMAGE)
    outcomes = [(p, type(m)) for p, m in sent if isinstance(m, ItemReceived | ItemRejected)]
    assert outcomes == [("preprocess", ItemRejected), ("preprocess", ItemReceived)]


@pytest.mark.parametrize(
    "changes",
    [{"mm_hash": "02" * 32}, {"mm_hash": ""}, {"item": 1}, {"item": 2**48}, {"attempt": 1}],
    ids=str,
)
def test_embeddings_that_no_prompt_asked_for_have_no_effect(changes: dict[str, Any]) -> None:
    """Neither on the request, nor on the preprocess that they name."""
    false = Tensor.of(np.full((5, 2), 7.0, np.float32))
    sent = LanguageGroup().play(
        [test_worker.prompt("innocent", images=IMAGE)],
        sent_embeddings(embeddings=false, preprocess_id="victim", **changes),
        sent_embeddings(),
    )
    assert answer_of(sent) == undisturbed(images=IMAGE)
    assert not [m for _, m in sent if isinstance(m, ItemRejected)]
    assert "victim" not in {peer for peer, _ in sent}


def test_early_embeddings_are_not_kept() -> None:
    large = Tensor("float32", (2**18, 2), bytes(2**21))
    events = [
        event
        for n in range(30)
        for event in sent_embeddings(request_id=f"unknown {n}", embeddings=large)
    ]
    group = LanguageGroup()
    assert group.play(events, [test_worker.prompt("innocent")])
    assert not group.engine.holds_anything


@pytest.mark.parametrize(
    ("peer", "role", "kind"),
    [
        ("another", "preprocess", Abort),
        ("another", "gateway", Abort),
        ("another", "detokenizer", StopFound),
    ],
)
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_nobody_ends_what_another_peer_brought(
    peer: str, role: str, kind: type[Any], batch: int
) -> None:
    attack = received(peer, role, kind(request_id="innocent", attempt=0))
    batches: list[list[Event]] = [[test_worker.prompt("innocent")], [], []]
    batches[batch] = attack + batches[batch]
    sent = LanguageGroup().play(*batches)
    assert answer_of(sent) == undisturbed()


def test_only_a_rank_of_the_group_makes_it_leave() -> None:
    group = LanguageGroup(frozenset({"llm.1"}))
    group.play([PeerDraining("another", "llm")], [test_worker.prompt("innocent")])
    assert group.drained == 0
    group.play([PeerDraining("llm.1", "llm")])
    assert group.drained == 1


@pytest.mark.parametrize(
    "message",
    [
        to_message(test_ranks.plan(), []),
        Hello(protocol_version=1, id="x", role="llm", fingerprint=""),
        Goodbye(reason=""),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_that_are_not_for_rank_0_are_ignored(message: Any) -> None:
    sent = LanguageGroup().play(received("x", "llm", message), [test_worker.prompt("innocent")])
    assert answer_of(sent) == undisturbed()


def test_an_exception_in_a_message_fails_its_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever no check foresees."""
    group = LanguageGroup()
    add = group.engine.sampler.add

    def fail_if_bad(key: tuple[str, int], *args: Any) -> None:
        add(key, *args)
        if key[0] == "bad":
            raise RuntimeError("unforeseen")

    monkeypatch.setattr(group.engine.sampler, "add", fail_if_bad)
    sent = group.play([test_worker.prompt("bad", images=IMAGE), test_worker.prompt("innocent")])
    assert answer_of(sent) == undisturbed()
    [failed] = [m for _, m in sent if isinstance(m, Failed)]
    assert failed.request_id == "bad" and "unforeseen" not in failed.message


def test_an_output_that_cannot_be_sent_fails_its_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Worker._send_output

    def fail_if_bad(self: Worker, output: Any) -> None:
        if output.request.key[0] == "bad":
            raise RuntimeError("unforeseen")
        whole(self, output)

    monkeypatch.setattr(Worker, "_send_output", fail_if_bad)
    sent = LanguageGroup().play([test_worker.prompt("bad"), test_worker.prompt("innocent")])
    assert answer_of(sent) == undisturbed()
    assert ("gateway", "bad") in [(p, m.request_id) for p, m in sent if isinstance(m, Failed)]


# The other ranks

LIMITS = StepLimits(
    vocab_size=10, num_blocks=4, block_size=16, input_width=4, num_position_components=3
)
STEP = to_message(test_ranks.plan(), [torch.ones(1, 4)])


def test_a_step_that_fits_is_executed() -> None:
    check_step(STEP, LIMITS)


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": int64(0, 1, 10)},
        {"token_ids": int64(0, 1, -1)},
        {"token_ids": Tensor.of(np.ones(3, np.float32))},
        {"token_ids": Tensor.of(np.array(1))},
        {"positions": Tensor.of(np.zeros((2, 3), np.int64))},
        {"positions": Tensor.of(np.full((3, 3), 2**40))},
        {"slot_mapping": int64(16, 17, 64)},
        {"slot_mapping": int64(16, 17, -1)},
        {"query_lens": int64(4)},
        {"query_lens": int64(0)},
        {"query_lens": int64(1, 2)},
        {"context_lens": int64(33)},
        {"context_lens": int64(2)},
        {"block_tables": Tensor.of(np.array([[4, 0]]))},
        {"block_tables": Tensor.of(np.array([[-1, 0]]))},
        {"block_tables": int64(1)},
        {"item_rows": int64(3)},
        {"item_rows": int64(1, 2)},
        {"sampled_rows": int64(-1)},
        {"rope_parameters": int64()},
        {"adapters": int64(-1)},
        {"embeddings": ()},
        {"embeddings": (Tensor.of(np.ones((1, 3), np.float32)),)},
        {"embeddings": (Tensor.of(np.ones(4, np.float32)),)},
    ],
    ids=str,
)
def test_a_step_with_wrong_contents_never_reaches_a_kernel(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        check_step(replace(STEP, **changes), LIMITS)


def test_a_rank_executes_the_steps_of_its_rank_0_only() -> None:
    bad = replace(STEP, slot_mapping=int64(2**40, 2**40, 2**40))
    events: list[Event] = [
        *received("another", "llm", bad, STEP),
        *received("preprocess", "preprocess", create_prompt(), Abort(request_id="r", attempt=0)),
        *received("llm.0", "llm", STEP),
    ]
    executed: list[int] = []
    member: Any = test_ranks.ScriptedMember(events)
    follow(member, "llm.0", LIMITS, lambda plan, _: executed.append(1) or torch.zeros(0))
    assert executed == [1]


def test_rank_0_waits_for_its_own_ranks_and_sends_its_steps_to_no_other() -> None:
    member: Any = test_ranks.ScriptedMember([PeerUp("another", "llm"), PeerUp("llm.1", "llm")])
    lead(member, {"llm.1"}, lambda *_: torch.zeros(1))(test_ranks.plan(), [])
    assert [peer for peer, m in member.links.sent if isinstance(m, ExecuteStep)] == ["llm.1"]


def test_the_loss_of_a_peer_that_only_claims_to_be_a_rank_ends_no_group() -> None:
    member: Any = Member.__new__(Member)
    lost: list[str] = []
    member._inbox = []
    member._on_group_loss = lost.append
    member._ranks = None
    member.meet(["llm.0", "llm.1"])
    member._on_event(PeerDown("another", "llm", "left"))
    assert lost == []
    member._on_event(PeerDown("llm.1", "llm", "killed"))
    assert lost == ["killed"]


# The detokenizer


def start_of(**changes: Any) -> list[Event]:
    [event] = start("bad")
    bad = on_wire(replace(event.message, **changes), "llm", "detokenizer")
    return received("llm-1", "llm", bad)


def tokens_of(**changes: Any) -> list[Event]:
    [event] = tokens(0, ids_of("ab"), request_id="bad", logprobs=True)
    bad = on_wire(replace(event.message, **changes), "llm", "detokenizer")
    return received("llm-1", "llm", bad)


def assert_the_innocent_is_answered(detokenizer: Detokenizer) -> None:
    detokenizer.play(tokens(2, ids_of("c"), "length", request_id="innocent"))
    assert detokenizer.text("innocent") == "abc"
    assert not detokenizer.answers


def with_innocent() -> Detokenizer:
    detokenizer = Detokenizer("gateway-1", "gateway-2")
    detokenizer.play(start("innocent"), tokens(0, ids_of("ab"), request_id="innocent"))
    return detokenizer


@pytest.mark.parametrize(
    "changes",
    [
        {"timings": Tensor.of_text("{")},
        {"timings": Tensor.of_text("3")},
        {"timings": Tensor.of_text('{"decode_seconds": "x"}')},
        {"timings": Tensor.of_text('{"decode_seconds": NaN}')},
        {"timings": Tensor.of_bytes(b"\xff")},
        {"timings": Tensor.of_text('{"a": ' + "[" * 60_000)},
        {"output_token_ids": int64(-1)},
        {"output_token_ids": int64(2**40)},
        {"output_token_ids": int64(*[1] * 1001)},
        {"output_token_ids": Tensor.of(np.ones(2, np.float32))},
        {"output_token_ids": Tensor.of(np.array(3))},
        {"output_token_ids": Tensor.of(np.ones((2, 2), np.int64))},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_start_with_wrong_contents_fails_its_answer_alone(changes: dict[str, Any]) -> None:
    detokenizer = with_innocent()
    detokenizer.play(start_of(**changes))
    [failed] = detokenizer.member.links.of(Failed)
    [stopped] = detokenizer.member.links.of(StopFound)
    assert failed.request_id == stopped.request_id == "bad"
    assert_the_innocent_is_answered(detokenizer)


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": 1},
        {"offset": 2**48},
        {"finish_reason": "because"},
        {"token_ids": int64(-1, 1)},
        {"token_ids": int64(2**40, 1)},
        {"token_ids": int64(*[1] * 1001)},
        {"token_ids": Tensor.of(np.ones(2, np.float32))},
        {"token_ids": Tensor.of(np.array(3))},
        {"token_ids": Tensor.of(np.ones((2, 2), np.int64))},
        {"logprobs": None},
        {"logprobs": Tensor.of(np.zeros(1, np.float32))},
        {"logprobs": Tensor.of(np.array(0.0, np.float32))},
        {"logprobs": Tensor.of(np.zeros(2, np.int64))},
        {"logprobs": Tensor.of(np.full(2, np.nan, np.float32))},
        {"top_token_ids": None},
        {"top_token_ids": Tensor.of(np.full((2, 1), -1))},
        {"top_token_ids": Tensor.of(np.full((2, 1), 2**40))},
        {"top_token_ids": Tensor.of(np.array(3))},
        {"top_token_ids": Tensor.of(np.ones((2, 21), np.int64))},
        {"top_logprobs": None},
        {"top_logprobs": Tensor.of(np.zeros((2, 2), np.float32))},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_tokens_with_wrong_contents_fail_their_answer_alone(changes: dict[str, Any]) -> None:
    detokenizer = with_innocent()
    detokenizer.play(start("bad"), tokens_of(**changes), tokens_of())
    [failed] = detokenizer.member.links.of(Failed)
    [stopped] = detokenizer.member.links.of(StopFound)
    assert failed.request_id == stopped.request_id == "bad"
    assert not [d for d in detokenizer.deltas if d.request_id == "bad"]
    assert_the_innocent_is_answered(detokenizer)


def test_many_alternatives_of_a_token_are_refused() -> None:
    detokenizer = with_innocent()
    wide = Tensor.of(np.ones((2, 5000), np.int64))
    low = Tensor.of(np.zeros((2, 5000), np.float32))
    detokenizer.play(start("bad"), tokens_of(top_token_ids=wide, top_logprobs=low))
    assert [m.request_id for m in detokenizer.member.links.of(Failed)] == ["bad"]
    assert_the_innocent_is_answered(detokenizer)


@pytest.mark.parametrize(
    "message",
    [
        Tokens(request_id="innocent", attempt=0, offset=2, token_ids=int64(1)),
        Failed(request_id="innocent", attempt=0, code="Internal", message="", stage="llm"),
        Abort(request_id="innocent", attempt=0),
        start("innocent", llm="llm-2", gateway="gateway-2")[0].message,
        start("innocent", llm="llm-2", stop=("b",))[0].message,
    ],
    ids=lambda message: type(message).__name__,
)
def test_an_answer_belongs_to_the_group_that_began_it(message: Any) -> None:
    detokenizer = with_innocent()
    detokenizer.play(received("llm-2", "llm", message))
    assert not detokenizer.member.links.of(Failed)
    assert_the_innocent_is_answered(detokenizer)


def test_an_answer_for_a_gateway_that_is_not_connected_is_refused() -> None:
    detokenizer = with_innocent()
    detokenizer.play(start("bad", gateway="llm-1"))
    assert not detokenizer.member.links.of(Failed)
    assert len(detokenizer.member.links.of(StopFound)) == 1
    assert_the_innocent_is_answered(detokenizer)


def test_answers_without_an_end_are_bounded_for_each_group_and_expire(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(detokenizer_worker, "MAX_ANSWERS_OF_A_GROUP", 50)
    detokenizer = with_innocent()
    events = [event for n in range(200) for event in start(f"bad {n}", llm="llm-2")]
    for event in events:
        event.message.timeout = 0.0
    detokenizer.play(events)
    assert len(detokenizer.member.links.of(StopFound)) >= 150
    detokenizer.play(start("another", llm="llm-1"))
    detokenizer.worker._drop_expired(time.monotonic() + 1)
    assert sorted(key[0] for key in detokenizer.answers) == ["another", "innocent"]


def test_an_exception_in_tokens_fails_their_answer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    detokenizer = with_innocent()
    detokenizer.play(start("bad"))
    monkeypatch.setattr(detokenizer.answers["bad", 0].decoder, "push", lambda _: 1 / 0)
    detokenizer.play(tokens_of())
    assert [m.request_id for m in detokenizer.member.links.of(Failed)] == ["bad"]
    assert_the_innocent_is_answered(detokenizer)


# Vision

CHECKPOINT = open_checkpoint(GoldenCase("a_image").checkpoint)
VALUES = 3 * 14 * 14


def checked_replica(**settings: Any) -> Replica:
    return Replica(rules=ItemRules.of(CHECKPOINT, **settings))


def patches_of(value: int, num_patches: int = 4) -> np.ndarray:
    return np.full((num_patches, VALUES), value, np.uint8)


def name_of(patches: np.ndarray) -> str:
    return item_hash(CHECKPOINT.fingerprint, "image", (1, 2, 2), (28, 28), patches.data)


def offer_of(
    request_id: str, value: int, preprocess: str = "preprocess-1", **changes: Any
) -> list[Event]:
    """Return the offer of an item whose every byte is `value`."""
    message = Offer(
        request_id=request_id,
        attempt=0,
        item=0,
        mm_hash=name_of(patches_of(value)),
        grid_thw=(1, 2, 2),
        content_size=(28, 28),
        num_patches=4,
        llm=LLM,
        timeout=60,
    )
    bad = on_wire(replace(message, **changes), "preprocess", "vision")
    return received(preprocess, "preprocess", bad)


def pixels_of(
    request_id: str, patches: np.ndarray, preprocess: str = "preprocess-1"
) -> list[Event]:
    message = Pixels(request_id=request_id, attempt=0, item=0, patches=Tensor.of(patches))
    return received(preprocess, "preprocess", on_wire(message, "preprocess", "vision"))


def assert_the_innocent_is_encoded(replica: Replica, value: int = 1) -> None:
    replica.play(offer_of("innocent", value, "preprocess-9"))
    replica.play(pixels_of("innocent", patches_of(value), "preprocess-9"))
    replica.encode_all()
    assert replica.embeddings()[-1] == ("innocent", float(value * 4 * VALUES))
    assert not replica.jobs


def test_other_pixels_under_the_name_of_an_item_change_nothing() -> None:
    """They fail, the cache does not learn them, and an equal item gets a grant of its own."""
    replica = checked_replica()
    replica.play(
        offer_of("bad", 1), offer_of("twin", 1, "preprocess-2"), pixels_of("bad", patches_of(2))
    )
    [failed] = replica.member.links.of(Failed)
    assert failed.request_id == "bad" and not replica.tower.encoded
    assert replica.cache.num_bytes == 0
    assert replica.grants() == [("bad", 0), ("twin", 0)]
    replica.play(pixels_of("twin", patches_of(1), "preprocess-2"))
    replica.encode_all()
    assert replica.embeddings() == [("twin", 4.0 * VALUES)]
    replica.play(offer_of("later", 1))
    assert replica.embeddings()[-1] == ("later", 4.0 * VALUES)


@pytest.mark.parametrize(
    "patches",
    [
        patches_of(1, 3),
        patches_of(1, 5),
        patches_of(1)[:, :-1],
        patches_of(1).reshape(-1),
        patches_of(1).reshape(2, 2, VALUES),
        np.zeros((0, VALUES), np.uint8),
        patches_of(1).astype(np.float32),
        np.array(1, np.uint8),
    ],
    ids=lambda patches: f"{patches.dtype}{patches.shape}",
)
def test_pixels_of_another_shape_fail_their_item_alone(patches: np.ndarray) -> None:
    replica = checked_replica()
    replica.play(offer_of("bad", 1), pixels_of("bad", patches))
    assert [m.request_id for m in replica.member.links.of(Failed)] == ["bad"]
    assert_the_innocent_is_encoded(replica)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_patches": 200_000, "grid_thw": (1, 400, 500), "content_size": (5600, 7000)},
        {"num_patches": 0, "grid_thw": (1, 0, 0), "content_size": (0, 0)},
        {"num_patches": 8},
        {"num_patches": 2**48},
        {"num_patches": 4, "grid_thw": (1, 1, 4), "content_size": (14, 56)},
        {"num_patches": 4, "grid_thw": (4, 1, 1), "content_size": (14, 14)},
        {"num_patches": 8, "grid_thw": (2, 2, 2)},
        {"num_patches": 6, "grid_thw": (1, 2, 3), "content_size": (28, 42)},
        {"content_size": (28, 27)},
        {"content_size": (2**48, 2**48)},
        {"llm": Peer("llm-1", "")},
        {"llm": Peer("", "ipc:///llm-1")},
        {"llm": Peer("llm-1", "pgm://x")},
    ],
    ids=str,
)
def test_an_offer_with_wrong_contents_is_refused_alone(changes: dict[str, Any]) -> None:
    replica = checked_replica()
    replica.play(offer_of("bad", 1, **changes))
    assert [m.request_id for m in replica.member.links.of(Failed)] == ["bad"]
    assert not replica.jobs and not replica.grants()
    assert_the_innocent_is_encoded(replica)


def test_an_offer_cannot_break_the_connection_of_a_peer_that_it_names() -> None:
    replica = checked_replica()
    replica.play([PeerUp("victim", "preprocess")])
    replica.play(offer_of("bad", 1, llm=Peer("victim", "ipc:///victim")))
    assert [m.request_id for m in replica.member.links.of(Failed)] == ["bad"]
    assert not replica.member.links.connected


def test_an_item_beyond_the_largest_bucket_is_refused() -> None:
    grid: dict[str, Any] = {"grid_thw": (1, 4, 4), "content_size": (56, 56), "num_patches": 16}
    replica = checked_replica(buckets=(4, 8))
    replica.play(offer_of("bad", 1, **grid))
    assert [m.request_id for m in replica.member.links.of(Failed)] == ["bad"]
    allowed = checked_replica(buckets=(4, 16))
    allowed.play(offer_of("good", 1, **grid))
    assert allowed.grants() == [("good", 0)]


@pytest.mark.parametrize("min_pixels", [None, 200_704])
@pytest.mark.parametrize("max_pixels", [None, 3136, 200_704])
@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (700, 4000), (1700, 1700), (57, 57)])
def test_every_item_that_preprocess_makes_is_taken(
    min_pixels: int | None, max_pixels: int | None, size: tuple[int, int]
) -> None:
    from tests.preprocess.builders import create_preprocessor

    if min_pixels and max_pixels and min_pixels > max_pixels:
        pytest.skip("they contradict each other")
    rules = create_preprocessor(CHECKPOINT, min_pixels, max_pixels).rules
    height, width = rules.fitting_size(*size, 0)
    item = rules.prepare_item("image", np.zeros((height, width, 3), np.uint8))
    message = Offer(
        request_id="r",
        attempt=0,
        item=0,
        mm_hash=item.mm_hash,
        grid_thw=item.grid_thw,
        content_size=item.content_size,
        num_patches=item.num_patches,
        llm=LLM,
        timeout=60,
    )
    checked = ItemRules.of(CHECKPOINT, min_pixels, max_pixels)
    assert checked.objection_to(message) == ""
    assert checked.objection_to_patches(message, Tensor.of(item.patches())) == ""


def test_a_second_offer_of_an_item_leaves_the_first() -> None:
    replica = checked_replica()
    replica.play(offer_of("innocent", 1), offer_of("innocent", 2))
    assert len(replica.member.links.of(Grant)) == 1
    replica.play(pixels_of("innocent", patches_of(1)))
    replica.encode_all()
    assert replica.embeddings() == [("innocent", 4.0 * VALUES)] and not replica.jobs


def test_an_item_belongs_to_the_preprocess_that_offered_it() -> None:
    """Another may neither send its pixels, nor abort it, nor take its key."""
    replica = checked_replica()
    replica.play(
        offer_of("innocent", 2, "preprocess-2"),
        offer_of("innocent", 1),
        received("preprocess-2", "preprocess", Abort(request_id="innocent", attempt=0)),
        pixels_of("innocent", patches_of(2), "preprocess-2"),
    )
    assert not replica.member.links.of(Failed)
    replica.play(pixels_of("innocent", patches_of(1)))
    replica.encode_all()
    assert replica.embeddings() == [("innocent", 4.0 * VALUES)] and not replica.jobs


def test_offers_of_one_preprocess_do_not_use_up_what_others_may_have_waiting() -> None:
    replica = checked_replica()
    replica.play(offer_of("first", 1), offer_of("second", 2))
    replica.play([e for n in range(MAX_JOINED + 9) for e in offer_of(f"bad {n}", 1)])
    assert len(replica.take(CacheHit)) == MAX_JOINED - 2 and replica.take(Busy)
    replica.play(offer_of("innocent", 1, "preprocess-2"))
    assert [(p, m.request_id) for p, m in replica.take(CacheHit)] == [("preprocess-2", "innocent")]


def test_an_exception_in_an_offer_fails_its_item_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = checked_replica()
    monkeypatch.setattr(replica.worker, "_grant", lambda _: 1 / 0)
    replica.play(offer_of("bad", 1))
    monkeypatch.undo()
    assert [m.request_id for m in replica.member.links.of(Failed)] == ["bad"]
    assert_the_innocent_is_encoded(replica)


# The gateway

GOOD_TOKEN: dict[str, Any] = {"token": "a", "logprob": -0.5, "bytes": [97], "token_id": 10}


def entries(*found: Any) -> Tensor:
    return Tensor.of_text(json.dumps(found))


@pytest.mark.parametrize(
    "changes",
    [
        {"text": Tensor.of_bytes(b"\xff")},
        {"text": Tensor.of(np.zeros(3, np.float32) - 1)},
        {"token_ids": Tensor.of(np.zeros(1, np.float32))},
        {"token_ids": Tensor.of(np.array(3))},
        {"token_ids": int64(-1)},
        {"token_ids": int64(2**40)},
        {"offset": 1},
        {"finish_reason": "because"},
        {"finish_reason": "stop"},
        {"finish_reason": "stop", "timings": Tensor.of_text("[]")},
        {"finish_reason": "stop", "timings": Tensor.of_bytes(b"\xff")},
        {"finish_reason": "stop", "timings": Tensor.of_text('{"decode_seconds": []}')},
        {"logprobs": Tensor.of_text("{")},
        {"logprobs": Tensor.of_text("3")},
        {"logprobs": Tensor.of_text("[" * 60_000)},
        {"logprobs": entries({})},
        {"logprobs": entries(GOOD_TOKEN)},
        {"logprobs": entries(*[GOOD_TOKEN | {"top_logprobs": []}] * 2)},
        {"logprobs": entries(GOOD_TOKEN | {"top_logprobs": [3]})},
        {"logprobs": entries(GOOD_TOKEN | {"top_logprobs": [], "logprob": None})},
    ],
    ids=lambda changes: str(changes)[:60],
)
async def test_a_delta_with_wrong_contents_fails_its_request_at_once(
    changes: dict[str, Any],
) -> None:
    gateway = Gateway()
    async with (
        gateway.core.generate(request("bad")) as bad,
        gateway.core.generate(request("innocent")) as innocent,
    ):
        gateway.on_event(routed("bad"), routed("innocent", llm="llm-1"))
        message = replace(delta(0, [10], "a", request_id="bad"), **changes)
        gateway.on_event(on_wire(message, "detokenizer", "gateway"))
        assert (await error_of(bad)).stage == "detokenizer"
        gateway.on_event(delta(0, [10], "a", "stop", request_id="innocent"))
        assert isinstance((await rest(innocent))[-1], Ended)
    assert gateway.is_idle


@pytest.mark.parametrize(
    "changes",
    [
        {"llm": Peer("llm-1", "")},
        {"llm": Peer("", "ipc:///x")},
        {"llm": Peer("llm-9", "inproc://x")},
        {"llm": Peer("detokenizer-1", "ipc:///x")},
        {"prompt_token_ids": Tensor.of(np.zeros(2, np.float32))},
        {"prompt_token_ids": Tensor.of(np.array(2))},
        {"prompt_token_ids": int64(-1)},
    ],
    ids=str,
)
async def test_a_route_with_wrong_contents_fails_its_request_at_once(
    changes: dict[str, Any],
) -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as events:
        gateway.on_event(on_wire(replace(routed(), **changes), "preprocess", "gateway"))
        assert (await error_of(events)).stage == "preprocess"
    assert gateway.is_idle and not gateway.links.connected


@pytest.mark.parametrize(
    ("peer", "role", "message"),
    [
        ("detokenizer-2", "detokenizer", delta(0, [66], "no", "stop")),
        ("llm-2", "llm", Failed(request_id="r", attempt=0, code="x", message="", stage="llm")),
        (
            "preprocess-2",
            "preprocess",
            Failed(request_id="r", attempt=0, code="x", message="", stage="llm"),
        ),
        ("preprocess-2", "preprocess", routed(llm="llm-2")),
        ("preprocess-2", "preprocess", HandedOver(request_id="r", attempt=0)),
        ("preprocess-2", "preprocess", ItemsLeft(request_id="r", attempt=0)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("is_routed", [False, True])
async def test_a_member_that_does_not_hold_a_request_has_no_effect_on_it(
    peer: str, role: str, message: Any, is_routed: bool
) -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as events:
        own = replace(message, request_id=gateway.id_of("r"))
        if is_routed:
            gateway.on_event(routed())
        gateway.core.on_event(Received(peer, role, own))
        if not is_routed:
            gateway.on_event(routed())
        gateway.on_event(delta(0, [10], "a", "stop"))
        assert isinstance((await rest(events))[-1], Ended)
    assert gateway.is_idle and gateway.aborts() == []


async def test_a_refusal_that_arrives_before_its_route_is_kept_until_that_arrives() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as events:
        failed = Failed(
            request_id=gateway.id_of("r"), attempt=0, code="Internal", message="no", stage="llm"
        )
        gateway.core.on_event(Received("llm-1", "llm", failed))
        gateway.on_event(routed())
        assert (await error_of(events)).message == "no"
    assert gateway.is_idle


async def test_an_exception_in_a_message_of_the_gateway_fails_its_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as events:
        gateway.on_event(routed())
        monkeypatch.setattr(gateway.core, "_on_delta", lambda *_: 1 / 0)
        gateway.on_event(delta(0, [10], "a"))
        assert (await error_of(events)).code == "Internal"
    assert gateway.is_idle


async def test_a_message_that_names_no_request_ends_nothing() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as events:
        gateway.core.on_event(Received("x", "llm", Goodbye(reason="")))  # type: ignore[arg-type]
        gateway.on_event(routed(), delta(0, [10], "a", "stop"))
        assert isinstance((await rest(events))[-1], Ended)


def test_the_aborts_for_a_member_that_is_gone_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_peers, "MAX_UNSENT_ABORTS", 5)
    gateway = Gateway()
    for n in range(20):
        gateway.core.peers.send_abort("gone", Abort(request_id=f"r{n}", attempt=0))
    gateway.links.take()
    gateway.core.on_event(PeerUp("gone", "llm", "ipc:///gone"))
    assert [m.request_id for _, m in gateway.links.sent] == [f"r{n}" for n in range(15, 20)]


# Every member


def test_a_member_sends_a_peer_only_what_its_role_handles() -> None:
    """Otherwise a message that names the wrong peer would break the connection to that peer."""
    me = Hello(protocol_version=1, id="llm", role="llm", fingerprint="")
    connections = Connections[Any](me, Progress())
    connections.connect(Peer("p", "ipc:///p"), "detokenizer")
    assert connections.may_send("p", Abort(request_id="r", attempt=0))
    assert not connections.may_send("p", Reserved(request_id="r", attempt=0))
    assert not connections.may_send("q", Abort(request_id="r", attempt=0))


@pytest.mark.parametrize(
    "message",
    [
        Failed(request_id="r", attempt=0, code="x", message="y" * 5000, stage="llm"),
        ItemRejected(request_id="r", attempt=0, item=0, reason="y" * 5000),
        Goodbye(reason="y" * 5000),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_reason_that_quotes_another_is_cut_to_what_its_receiver_accepts(message: Any) -> None:
    received_text = decode(encode(message), type(message))
    text = getattr(received_text, "message", None) or received_text.reason
    assert len(text) == MAX_TEXT_CHARS
