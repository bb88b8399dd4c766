"""The preprocess worker: from a submitted request to a prompt and offers, and who owns an image until it has arrived."""

import json
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

from common.checkpoint import open_checkpoint
from common.links import Down, Event, Up
from common.messages import (
    Abort,
    Failed,
    Grant,
    ImageReceived,
    ImageRejected,
    Offer,
    Peer,
    Pixels,
    Prompt,
    Routed,
    Sampling,
    Stopping,
    Submit,
)
from common.wire import Tensor
from services.preprocess.families.qwen2_5_vl import Preprocessor
from services.preprocess.under_way import Handover, Key, Preparation
from services.preprocess.worker import MAX_DISPATCHES, Worker
from tests.fakes import FakeMember, aborts, received
from tests.preprocess.cases import checkpoint_path, encoded, noise

PREPROCESSOR = Preprocessor(open_checkpoint(str(checkpoint_path("a_image"))))
LLM = Peer("llm-1", "ipc:///llm-1")
IMAGES = [encoded(noise(56, 56, seed)) for seed in range(4)]


class Preprocess:
    def __init__(self, *vision_ids: str, llm: bool = True) -> None:
        self.member = FakeMember()
        self.preparations, self.handovers = OrderedDict[Key, Preparation](), dict[Key, Handover]()
        self.worker = Worker(self.member, PREPROCESSOR, self.preparations, self.handovers)
        ups: list[Event] = [Up(id, "vision", f"ipc:///{id}") for id in vision_ids]
        self.play(ups + [Up(LLM.id, "llm", LLM.address)] * llm)

    def play(self, *batches: list[Event]) -> list[tuple[str, Any]]:
        """Gives what was sent meanwhile."""
        self.member.play(self.worker, *batches)
        return self.member.links.take()

    @property
    def holds_nothing(self) -> bool:
        return not self.preparations and not self.handovers


def submit(
    request_id: str, *images: bytes, gateway: str = "gateway-1", prompt: bytes = b"", timeout: float = 60, **fields: Any
) -> list[Event]:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "Read it."}]
    message = Submit(
        request_id=request_id,
        attempt=0,
        prompt_kind="messages",
        prompt=Tensor.of_bytes(prompt or json.dumps([{"role": "user", "content": content}]).encode()),
        images=tuple(map(Tensor.of_bytes, images)),
        sampling=fields.get("sampling", Sampling()),
        stopping=fields.get("stopping", Stopping()),
        detokenizer=Peer("detokenizer-1", "ipc:///detokenizer-1"),
        timeout=timeout,
        return_prompt_token_ids=fields.get("return_prompt_token_ids", False),
    )
    return received(gateway, "gateway", message)


def abort(request_id: str) -> list[Event]:
    return received("gateway-1", "gateway", Abort(request_id=request_id, attempt=0))


def grant(vision_id: str, image: int, request_id: str = "r") -> list[Event]:
    return received(vision_id, "vision", Grant(request_id=request_id, attempt=0, image=image))


def failed(vision_id: str, image: int, request_id: str = "r") -> list[Event]:
    message = Failed(request_id=request_id, attempt=0, code="Internal", message="the tower failed", stage="vision", image=image)
    return received(vision_id, "vision", message)


def arrived(image: int, request_id: str = "r") -> list[Event]:
    return received(LLM.id, "llm", ImageReceived(request_id=request_id, attempt=0, image=image))


def rejected(image: int, request_id: str = "r") -> list[Event]:
    return received(LLM.id, "llm", ImageRejected(request_id=request_id, attempt=0, image=image, reason="embeddings that are no numbers"))


def offers(sent: list[tuple[str, Any]]) -> list[tuple[str, int]]:
    """(replica, image) of each Offer."""
    return [(receiver, message.image) for receiver, message in sent if isinstance(message, Offer)]


def failures(sent: list[tuple[str, Any]]) -> list[tuple[str, str, str, int | None]]:
    return [(receiver, m.request_id, m.code, m.image) for receiver, m in sent if isinstance(m, Failed)]


def prompts(sent: list[tuple[str, Any]]) -> list[str]:
    return [message.request_id for _, message in sent if isinstance(message, Prompt)]


def test_a_text_request_becomes_a_prompt_and_nothing_is_kept() -> None:
    preprocess = Preprocess("vision-1")
    (to_gateway, routed), (to_llm, prompt) = preprocess.play(submit("r", sampling=Sampling(top_p=0.5, seed=3)))
    assert (to_gateway, routed) == ("gateway-1", Routed(request_id="r", attempt=0, llm=LLM))
    assert to_llm == LLM.id and (prompt.request_id, prompt.gateway_id, prompt.detokenizer.id) == ("r", "gateway-1", "detokenizer-1")
    ids = prompt.token_ids.numpy()
    assert PREPROCESSOR.tokenizer.decode(ids.tolist()).count("Read it.") == 1
    assert (prompt.positions.numpy() == np.arange(len(ids))).all() and prompt.rope_delta == 0
    assert (prompt.placeholders.shape, prompt.mm_hashes.shape) == ((0, 2), (0, 32))
    assert prompt.stopping.max_tokens == PREPROCESSOR.max_model_len - len(ids)
    assert (prompt.sampling.top_p, prompt.sampling.seed) == (0.5, 3) and prompt.sampling.temperature is not None
    assert 0 < prompt.timeout <= 60
    timings = json.loads(prompt.timings.bytes())
    assert timings["preprocess_seconds"] > 0 and timings["images"] == []
    assert preprocess.holds_nothing


def test_the_gateway_gets_the_expanded_prompt_where_it_asks_for_it() -> None:
    sent = Preprocess("vision-1").play(submit("r", IMAGES[0], return_prompt_token_ids=True))
    (_, routed), (_, prompt) = sent[:2]
    assert routed.prompt_token_ids == prompt.token_ids
    assert (prompt.token_ids.numpy() == PREPROCESSOR.image_token_id).sum() == prompt.placeholders.numpy()[0, 1] > 1


def test_an_image_is_kept_until_its_embeddings_have_arrived_and_only_a_grant_moves_its_pixels() -> None:
    preprocess = Preprocess("vision-1")
    sent = preprocess.play(submit("r", *IMAGES[:2]))
    assert [type(message) for _, message in sent] == [Routed, Prompt, Offer, Offer]
    plans = [PREPROCESSOR.image_plan(image) for image in IMAGES[:2]]
    for (_, offer), plan in zip(sent[2:], plans, strict=True):
        assert (offer.mm_hash, offer.grid_thw, offer.num_patches, offer.llm) == (plan.mm_hash, plan.grid_thw, plan.num_patches, LLM)
    assert [bytes(row).hex() for row in sent[1][1].mm_hashes.numpy()] == [plan.mm_hash for plan in plans]
    assert len(json.loads(sent[1][1].timings.bytes())["images"]) == 2
    [(receiver, pixels)] = preprocess.play(grant("vision-1", 1))
    assert (receiver, pixels.image) == ("vision-1", 1)
    assert (pixels.patches.numpy() == plans[1].patches()).all()
    assert preprocess.play(arrived(1)) == [] and list(preprocess.handovers[("r", 0)].images) == [0]
    assert preprocess.play(arrived(0), arrived(0)) == [] and preprocess.holds_nothing


def test_each_image_goes_to_the_replica_with_the_fewest_in_hand() -> None:
    preprocess = Preprocess("vision-1", "vision-2")
    sent = preprocess.play(submit("r", *IMAGES[:3]))
    assert offers(sent) == [("vision-1", 0), ("vision-2", 1), ("vision-1", 2)]
    sent = preprocess.play(arrived(0), arrived(2), submit("r2", IMAGES[0]))
    assert offers(sent) == [("vision-1", 0)]


def test_the_images_of_a_lost_replica_that_have_not_arrived_are_offered_to_another() -> None:
    preprocess = Preprocess("vision-1", "vision-2")
    preprocess.play(submit("r", *IMAGES[:4]))
    sent = preprocess.play(arrived(0), [Down("vision-1", "vision", "gone")])
    assert offers(sent) == [("vision-2", 2)] and failures(sent) == []
    assert preprocess.play(arrived(1), arrived(2), arrived(3)) == [] and preprocess.holds_nothing


@pytest.mark.parametrize("objection", [rejected(1), failed("vision-2", 1)], ids=["rejected", "failed"])
def test_an_image_that_failed_goes_to_another_replica_alone(objection: list[Event]) -> None:
    preprocess = Preprocess("vision-1", "vision-2")
    assert offers(preprocess.play(submit("r", *IMAGES[:2]))) == [("vision-1", 0), ("vision-2", 1)]
    sent = preprocess.play(objection)
    assert offers(sent) == [("vision-1", 1)] and len(sent) == 1
    [(receiver, pixels)] = preprocess.play(grant("vision-1", 1))
    assert isinstance(pixels, Pixels) and receiver == "vision-1"


def test_an_image_that_fails_everywhere_fails_its_request_by_index_and_cause() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.play(submit("r", *IMAGES[:2]))
    for _ in range(MAX_DISPATCHES - 1):
        assert offers(preprocess.play(failed("vision-1", 1))) == [("vision-1", 1)]
    sent = preprocess.play(failed("vision-1", 1))
    assert failures(sent) == [("gateway-1", "r", "Internal", 1)]
    error = sent[-1][1]
    assert error.stage == "vision" and "image 1" in error.message and "the tower failed" in error.message
    assert aborts(sent) == [("vision-1", "r")], "its other image is not wanted any more"
    assert preprocess.holds_nothing and preprocess.play(failed("vision-1", 0)) == []


@pytest.mark.parametrize(("visions", "llm", "stage"), [((), True, "vision"), (("vision-1",), False, "llm")])
def test_a_request_with_nobody_to_take_it_fails_at_once(visions: tuple[str, ...], llm: bool, stage: str) -> None:
    preprocess = Preprocess(*visions, llm=llm)
    [(_, error)] = [(receiver, m) for receiver, m in preprocess.play(submit("r", *IMAGES[:2])) if isinstance(m, Failed)]
    assert (error.code, error.stage) == ("Unavailable", stage)
    assert preprocess.holds_nothing


def test_the_loss_of_the_only_replica_fails_each_request_that_it_had_images_of_once() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.play(submit("r1", *IMAGES[:3]), submit("r2", IMAGES[0]), submit("r3", IMAGES[1]))
    sent = preprocess.play(arrived(0, "r3"), [Down("vision-1", "vision", "gone")])
    assert failures(sent) == [("gateway-1", "r1", "Unavailable", 0), ("gateway-1", "r2", "Unavailable", 0)]
    assert preprocess.holds_nothing


def test_an_abort_before_anything_was_done_leaves_nothing() -> None:
    preprocess = Preprocess("vision-1")
    assert preprocess.play(submit("r", IMAGES[0]) + abort("r")) == []
    assert preprocess.holds_nothing


def test_an_abort_between_two_images_ends_the_preparation() -> None:
    preprocess = Preprocess("vision-1")
    assert preprocess.play(submit("r", *IMAGES), [], [], abort("r")) == []
    assert preprocess.holds_nothing


def test_an_abort_after_the_hand_over_reaches_each_replica_that_has_an_image() -> None:
    preprocess = Preprocess("vision-1", "vision-2", "vision-3")
    preprocess.play(submit("r", *IMAGES[:3]))
    sent = preprocess.play(arrived(1), abort("r"))
    assert sorted(aborts(sent)) == [("vision-1", "r"), ("vision-3", "r")] and len(sent) == 2
    assert preprocess.holds_nothing


def test_a_lost_gateways_requests_are_freed_at_every_stage_of_theirs() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.play(submit("taken", IMAGES[0], gateway="gateway-2"), submit("kept", IMAGES[0]))
    waiting = submit("waiting", *IMAGES, gateway="gateway-2")
    sent = preprocess.play(waiting, [], [Down("gateway-2", "gateway", "gone")])
    assert sent == [("vision-1", Abort(request_id="taken", attempt=0))]
    assert not preprocess.preparations and list(preprocess.handovers) == [("kept", 0)]


def test_a_lost_language_group_frees_what_was_on_its_way_there() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.play(submit("r", *IMAGES[:2]))
    assert aborts(preprocess.play([Down(LLM.id, "llm", "gone")])) == [("vision-1", "r")]
    assert preprocess.holds_nothing


def test_a_request_beyond_its_deadline_is_dropped() -> None:
    preprocess = Preprocess("vision-1")
    assert prompts(preprocess.play(submit("late", IMAGES[0], timeout=0) + submit("next"))) == ["next"]
    assert preprocess.holds_nothing


def test_an_unreadable_image_fails_its_request_by_index_and_the_next_request_works() -> None:
    preprocess = Preprocess("vision-1")
    sent = preprocess.play(submit("bad", IMAGES[0], b"no image") + submit("next", IMAGES[0]))
    assert failures(sent) == [("gateway-1", "bad", "UnreadableImage", 1)]
    assert sent[0][1].message.startswith("image 1: ") and sent[0][1].stage == "preprocess"
    assert prompts(sent) == ["next"]


def test_a_prompt_longer_than_the_context_is_refused_before_the_language_group_hears_of_it() -> None:
    sent = Preprocess("vision-1").play(submit("r", stopping=Stopping(max_tokens=PREPROCESSOR.max_model_len)))
    assert failures(sent) == [("gateway-1", "r", "InvalidRequest", None)] and len(sent) == 1


def test_what_nobody_foresaw_fails_one_request_alone() -> None:
    preprocess = Preprocess("vision-1")
    sent = preprocess.play(submit("bad", prompt=b"{no json") + submit("next"))
    assert failures(sent) == [("gateway-1", "bad", "Internal", None)]
    assert prompts(sent) == ["next"] and preprocess.holds_nothing


def test_a_grant_for_a_request_that_is_gone_is_answered_by_an_abort() -> None:
    assert Preprocess("vision-1").play(grant("vision-1", 0)) == [("vision-1", Abort(request_id="r", attempt=0))]


def test_a_late_grant_does_not_take_the_requests_other_images_from_the_replica() -> None:
    preprocess = Preprocess("vision-1", "vision-2")
    preprocess.play(submit("r", *IMAGES[:3]))
    assert preprocess.play(arrived(0), grant("vision-1", 0), grant("vision-1", 1)) == []
    assert [type(message) for _, message in preprocess.play(grant("vision-1", 2))] == [Pixels]


def test_it_is_ready_with_a_vision_replica_and_a_language_group_and_only_then() -> None:
    preprocess = Preprocess(llm=False)
    assert preprocess.member.missing is None
    ups: list[Event] = [Up("vision-1", "vision"), Up("llm-1", "llm"), Up("vision-2", "vision")]
    states = []
    for event in [*ups, Down("vision-1", "vision", ""), Down("vision-2", "vision", "")]:
        preprocess.play([event])
        states.append(preprocess.member.missing)
    assert states == [["llm"], [], [], [], ["vision"]]


def test_a_grant_is_served_between_the_images_of_a_long_request() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.play(submit("short", IMAGES[0]))
    sent = preprocess.play(submit("long", *IMAGES), [], grant("vision-1", 0, "short"))
    assert [(type(message), message.request_id) for _, message in sent[:2]] == [(Pixels, "short"), (Routed, "long")]


def test_language_groups_take_turns() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.play([Up("llm-2", "llm", "ipc:///llm-2")])
    sent = preprocess.play([event for n in range(4) for event in submit(f"r{n}")])
    assert [receiver for receiver, message in sent if isinstance(message, Prompt)] == ["llm-1", "llm-2", "llm-1", "llm-2"]
