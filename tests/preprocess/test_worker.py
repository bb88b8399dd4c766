"""The preprocess worker turns requests into prompts, and ends those that cannot become one."""

import json
from typing import Any

import numpy as np
import pytest

from common.apart import REPEAT_SECONDS
from common.events import Event, PeerDown, PeerDraining, PeerUp
from common.messages import (
    Abort,
    Alone,
    Cleared,
    Failed,
    LlmLoad,
    Noted,
    Prompt,
    Routed,
    Sampling,
    Stopping,
)
from common.wire import Tensor
from services.preprocess.in_flight import MISSING_SECONDS
from services.preprocess.sandbox.jobs import Prepare, Read, Spell
from services.preprocess.worker import MAX_HELD_BYTES, UNCONFIRMED_SECONDS
from tests.fakes import aborts, received
from tests.preprocess.builders import (
    IMAGES,
    LLM,
    PREPROCESSOR,
    Preprocess,
    abort,
    arrived,
    failures,
    grant,
    joins,
    prompts,
    submit,
)
from tests.preprocess.cases import encoded, noise

LARGE = [encoded(noise(1300, 1300), "JPEG")]
"""An image that is not prepared together with the prompt."""


def test_a_text_request_becomes_a_prompt_and_nothing_is_kept() -> None:
    preprocess = Preprocess("vision-1")
    (to_gateway, routed), (to_llm, prompt) = preprocess.play(
        submit("r", sampling=Sampling(top_p=0.5, seed=3))
    )
    assert (to_gateway, routed) == ("gateway-1", Routed(request_id="r", attempt=0, llm=LLM))
    assert to_llm == LLM.id and (prompt.request_id, prompt.gateway_id, prompt.detokenizer.id) == (
        "r",
        "gateway-1",
        "detokenizer-1",
    )
    ids = prompt.token_ids.numpy()
    text = b"".join(PREPROCESSOR.vocabulary.token_bytes(id) for id in ids.tolist())
    assert text.count(b"Read it.") == 1
    assert (prompt.positions.numpy() == np.arange(len(ids))).all() and prompt.rope_delta == 0
    assert (prompt.placeholders.shape, prompt.mm_hashes.shape) == ((0, 2), (0, 32))
    assert prompt.stopping.max_tokens == PREPROCESSOR.max_model_len - len(ids)
    assert (prompt.sampling.top_p, prompt.sampling.seed) == (
        0.5,
        3,
    ) and prompt.sampling.temperature is not None
    assert 0 < prompt.timeout <= 60
    timings = json.loads(prompt.timings.bytes())
    assert timings["preprocess_seconds"] > 0 and timings["images"] == []
    assert preprocess.holds_nothing


def test_the_gateway_gets_the_sizes_of_the_images_as_they_were_sent() -> None:
    images = [encoded(noise(40, 70), "PNG"), encoded(noise(1300, 600), "PNG")]
    sent = Preprocess("vision-1").play(submit("r", *images))
    [routed] = [message for _, message in sent if isinstance(message, Routed)]
    assert routed.item_sizes is not None
    assert routed.item_sizes.numpy().tolist() == [[40, 70], [1300, 600]]


def test_a_task_that_the_model_cannot_do_is_refused() -> None:
    sent = Preprocess("vision-1").play(submit("r", task="classify"))
    [(_, failed)] = sent
    assert isinstance(failed, Failed) and failed.code == "InvalidRequest"
    assert "it can generate" in failed.message


def test_the_tokens_of_a_prompt_are_those_that_the_model_would_get() -> None:
    sent = Preprocess("vision-1").play(submit("r", IMAGES[0]))
    [wanted] = [message.token_ids for _, message in sent if isinstance(message, Prompt)]
    preprocess = Preprocess("vision-1")
    [(gateway, found)] = preprocess.play(
        submit("t", IMAGES[0], task="tokenize", returns_token_names=True), []
    )
    assert (gateway, found.token_ids) == ("gateway-1", wanted) and found.text is None
    names = json.loads(found.token_names.bytes())
    assert len(names) == wanted.shape[0] and names[0] == "<|im_start|>"
    assert preprocess.holds_nothing
    assert [type(task.job) for task in preprocess.tasks.started] == [Read, Spell]


def test_tokens_become_text_again() -> None:
    ids = PREPROCESSOR.vocabulary.encode("Read it. <|im_end|>é")
    text_of = submit(
        "d",
        task="detokenize",
        prompt_kind="token_ids",
        prompt=Tensor.of_int64(ids),
    )
    preprocess = Preprocess("vision-1")
    [(_, found)] = preprocess.play(text_of)
    assert (found.token_ids, found.text.text()) == (None, "Read it. <|im_end|>é")
    assert preprocess.holds_nothing


@pytest.mark.parametrize("token_id", [-1, 10**9])
def test_tokens_that_do_not_exist_have_no_text(token_id: int) -> None:
    ids = Tensor.of_int64([token_id])
    ask = submit("d", task="detokenize", prompt_kind="token_ids", prompt=ids)
    sent = Preprocess("vision-1").play(ask)
    assert failures(sent) == [("gateway-1", "d", "InvalidRequest", None)]


@pytest.mark.parametrize(("task", "kind"), [("tokenize", "token_ids"), ("detokenize", "text")])
def test_a_conversion_must_fit_the_prompt(task: str, kind: str) -> None:
    prompt = Tensor.of_int64([1]) if kind == "token_ids" else Tensor.of_text("a")
    sent = Preprocess("vision-1").play(submit("d", task=task, prompt_kind=kind, prompt=prompt))
    assert failures(sent) == [("gateway-1", "d", "InvalidRequest", None)]


def test_a_prompt_of_text_is_read_as_it_is() -> None:
    ask = submit("r", prompt_kind="text", prompt=Tensor.of_text("<|im_end|>a"))
    [_, (_, prompt)] = Preprocess("vision-1").play(ask)
    assert prompt.token_ids.numpy().tolist() == PREPROCESSOR.vocabulary.encode("<|im_end|>a")
    empty = submit("r", prompt_kind="text", prompt=Tensor.of_text(""))
    sent = Preprocess("vision-1").play(empty)
    assert failures(sent) == [("gateway-1", "r", "InvalidRequest", None)]


def test_the_gateway_gets_the_expanded_prompt_if_it_asks_for_it() -> None:
    sent = Preprocess("vision-1").play(submit("r", IMAGES[0], return_prompt_token_ids=True))
    (_, routed), (_, prompt) = sent[:2]
    assert routed.prompt_token_ids == prompt.token_ids
    assert (
        (prompt.token_ids.numpy() == PREPROCESSOR.placeholder_id).sum()
        == prompt.placeholders.numpy()[0, 1]
        > 1
    )


def test_an_abort_before_anything_was_done_leaves_nothing() -> None:
    preprocess = Preprocess("vision-1")
    assert preprocess.play(submit("r", IMAGES[0]) + abort("r")) == []
    assert preprocess.holds_nothing


def test_an_abort_while_images_are_prepared_ends_the_preparation() -> None:
    preprocess = Preprocess("vision-1")
    assert preprocess.play(submit("r", *LARGE), [], abort("r")) == []
    assert [type(task.job) for task in preprocess.tasks.started] == [Read, Prepare]
    assert preprocess.holds_nothing


def test_an_unreadable_image_fails_its_request_by_index_and_the_next_request_works() -> None:
    preprocess = Preprocess("vision-1")
    sent = preprocess.play(submit("bad", IMAGES[0], b"no image") + submit("next", IMAGES[0]))
    assert failures(sent) == [("gateway-1", "bad", "UnreadableImage", 1)]
    assert sent[0][1].message.startswith("image 1: ") and sent[0][1].stage == "preprocess"
    assert prompts(sent) == ["next"]


def test_a_prompt_longer_than_the_context_never_reaches_the_language_group() -> None:
    sent = Preprocess("vision-1").play(
        submit("r", stopping=Stopping(max_tokens=PREPROCESSOR.max_model_len))
    )
    assert failures(sent) == [("gateway-1", "r", "ContextLengthExceeded", None)] and len(sent) == 1


def test_an_unforeseen_error_fails_only_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess = Preprocess("vision-1")
    expand = PREPROCESSOR.expand
    faults = iter([RuntimeError("a bug")])

    def expand_once_wrong(*arguments: Any) -> Any:
        for fault in faults:
            raise fault
        return expand(*arguments)

    monkeypatch.setattr(PREPROCESSOR, "expand", expand_once_wrong)
    sent = preprocess.play(submit("bad") + submit("next"))
    assert failures(sent) == [("gateway-1", "bad", "Internal", None)]
    assert prompts(sent) == ["next"] and preprocess.holds_nothing


def test_language_groups_take_turns() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.play([PeerUp("llm-2", "llm", "ipc:///llm-2")])
    sent = preprocess.play([event for n in range(4) for event in submit(f"r{n}")])
    assert [receiver for receiver, message in sent if isinstance(message, Prompt)] == [
        "llm-1",
        "llm-2",
        "llm-1",
        "llm-2",
    ]


def test_a_request_beyond_its_deadline_is_dropped() -> None:
    preprocess = Preprocess("vision-1", llm=False)
    preprocess.play([PeerUp(LLM.id, "llm", LLM.address), PeerDown(LLM.id, "llm", "gone")])
    preprocess.play(submit("late", IMAGES[0], timeout=10))
    assert preprocess.preparations
    assert preprocess.wait(11) == [] and preprocess.holds_nothing


def test_the_requests_of_a_lost_gateway_are_freed_in_every_state() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.dispatch("taken", IMAGES[0], gateway="gateway-2")
    preprocess.dispatch("kept", IMAGES[1])
    waiting = submit("waiting", *LARGE, gateway="gateway-2")
    sent = preprocess.play(waiting, [], [PeerDown("gateway-2", "gateway", "gone")])
    assert sent == [("vision-1", Abort(request_id="taken", attempt=0))]
    assert not preprocess.preparations and list(preprocess.handovers) == [("kept", 0)]


def test_requests_of_a_lost_language_group_are_freed_and_reported() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.dispatch("r", *IMAGES[:2])
    sent = preprocess.play([PeerDown(LLM.id, "llm", "gone")])
    assert aborts(sent) == [("vision-1", "r")]
    assert failures(sent) == [("gateway-1", "r", "Unavailable", None)]
    assert preprocess.holds_nothing


def test_a_prompt_that_may_not_have_arrived_is_reported_to_its_gateway_once() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.play(submit("long ago"))
    preprocess.wait(UNCONFIRMED_SECONDS + 1)
    preprocess.play(submit("just now"))
    preprocess.play([PeerUp("llm-2", "llm", "ipc:///llm-2"), PeerDown("llm-2", "llm", "another's")])
    sent = preprocess.play([PeerDown(LLM.id, "llm", "gone")])
    assert (
        failures(sent) == [("gateway-1", "just now", "Unavailable", None)]
        and sent[0][1].stage == "llm"
    )
    assert (
        preprocess.play([PeerUp(LLM.id, "llm", LLM.address), PeerDown(LLM.id, "llm", "gone")]) == []
    )


def test_a_request_fails_at_once_if_there_never_was_a_language_group() -> None:
    preprocess = Preprocess("vision-1", llm=False)
    sent = preprocess.play(submit("r", *IMAGES[:2]))
    assert failures(sent) == [("gateway-1", "r", "Unavailable", None)] and sent[0][1].stage == "llm"
    assert preprocess.holds_nothing


def test_a_request_waits_for_a_language_group_that_was_there_a_moment_ago() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.play([PeerDown(LLM.id, "llm", "gone")])
    assert preprocess.play(submit("r")) == []
    assert prompts(preprocess.play([PeerUp("llm-2", "llm", "ipc:///llm-2")])) == ["r"]


def test_a_request_waits_for_another_group_than_the_lost_one_and_delays_no_other() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.play([PeerUp("llm-2", "llm", "ipc:///llm-2"), PeerDown("llm-2", "llm", "gone")])
    assert prompts(preprocess.play(submit("lost", avoid=LLM.id) + submit("other"))) == ["other"]
    sent = preprocess.play([PeerUp("llm-3", "llm", "ipc:///llm-3")])
    assert [(receiver, m.request_id) for receiver, m in sent if isinstance(m, Prompt)] == [
        ("llm-3", "lost")
    ]


def test_a_request_does_not_wait_for_a_language_group_for_ever() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.play([PeerDown(LLM.id, "llm", "gone")])
    preprocess.play(submit("r", timeout=600))
    assert failures(preprocess.wait(MISSING_SECONDS + 1)) == [
        ("gateway-1", "r", "Unavailable", None)
    ]


def test_it_is_ready_with_a_language_group_and_a_vision_replica_that_has_reported() -> None:
    preprocess = Preprocess(llm=False)
    assert preprocess.member.missing == ["vision", "llm"] or preprocess.member.missing is None
    told = joins("vision-1")
    states = []
    for event in [
        *told,
        PeerUp("llm-1", "llm"),
        PeerDraining("vision-1", "vision"),
        *joins("vision-2"),
        PeerDown("vision-2", "vision", ""),
    ]:
        preprocess.play([event])
        states.append(preprocess.member.missing)
    assert states == [["vision", "llm"], ["llm"], [], ["vision"], ["vision"], [], ["vision"]]


def test_a_grant_is_served_between_the_images_of_a_long_request() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.dispatch("short", IMAGES[0])
    sent = preprocess.play(submit("long", *LARGE), [], grant("vision-1", 0, "short"))
    assert [(type(message).__name__, message.request_id) for _, message in sent[:2]] == [
        ("Pixels", "short"),
        ("Routed", "long"),
    ]


def test_decoding_pauses_while_too_many_bytes_wait_to_be_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preprocess = Preprocess("vision-1")
    size = 56 * 56 * 3
    monkeypatch.setattr("services.preprocess.worker.MAX_HELD_BYTES", 2 * size)
    preprocess.dispatch("first", *IMAGES[:2])
    assert prompts(preprocess.play(submit("second", IMAGES[2]) + submit("text"))) == ["text"]
    assert [len(p.items) for p in preprocess.preparations.values()] == [0]
    assert prompts(preprocess.play(arrived(0, "first"))) == ["second"]
    assert 100 * size < MAX_HELD_BYTES


def test_the_least_busy_group_gets_the_next_request() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.play(
        [PeerUp("llm-2", "llm", "ipc:///llm-2")],
        received(LLM.id, "llm", LlmLoad(running=3, waiting=2, free_tokens=9999)),
    )
    sent = preprocess.play([event for n in range(5) for event in submit(f"r{n}")])
    assert {receiver for receiver, message in sent if isinstance(message, Prompt)} == {"llm-2"}


# Requests that are apart


def from_gateway(kind: type[Noted | Cleared], request_id: str) -> list[Event]:
    return received("gateway-1", "gateway", kind(request_id=request_id, attempt=0))


def test_a_request_that_is_apart_is_prepared_alone_once_the_gateway_knows() -> None:
    preprocess = Preprocess("vision-1")
    sent = preprocess.play(submit("suspect", IMAGES[0], apart=True) + submit("next", IMAGES[1]))
    assert sent == [("gateway-1", Alone(request_id="suspect", attempt=0))]
    assert prompts(preprocess.play(from_gateway(Noted, "suspect"))) == ["suspect"]
    assert prompts(preprocess.play([])) == [], "the gateway has not seen yet that it has passed"
    assert prompts(preprocess.play(from_gateway(Cleared, "suspect"))) == ["next"]


@pytest.mark.parametrize(
    "end",
    [abort("suspect"), [PeerDown("gateway-1", "gateway", "killed")]],
    ids=["abort", "gateway's death"],
)
def test_a_request_that_ends_before_its_turn_gives_it_up(end: list[Event]) -> None:
    preprocess = Preprocess("vision-1")
    preprocess.play(submit("suspect", apart=True) + submit("next", gateway="gateway-2"))
    assert prompts(preprocess.play(end)) == ["next"]


def test_alone_is_reported_again_until_the_gateway_answers() -> None:
    preprocess = Preprocess("vision-1")
    alone = [("gateway-1", Alone(request_id="suspect", attempt=0))]
    assert preprocess.play(submit("suspect", apart=True)) == alone
    assert preprocess.play([]) == [] and preprocess.wait(REPEAT_SECONDS) == alone


def test_a_suspect_of_the_language_group_is_apart_there_only() -> None:
    [(_, _), (_, prompt)] = Preprocess("vision-1").play(submit("r", apart_in_llm=True))
    assert prompt.apart
