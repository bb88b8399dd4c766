"""An image has an owner until the language group has its embeddings, whatever replica fails."""

import pytest

from common.apart import MAX_DEATHS
from common.events import Event, PeerDown, PeerDraining
from common.messages import Abort, Decline, Failed, Grant, Pixels
from services.preprocess.dispatcher import MAX_FAILURES
from services.preprocess.in_flight import MISSING_SECONDS
from services.preprocess.preprocessor import Preprocessor
from tests.fakes import aborts, received
from tests.preprocess.builders import (
    IMAGES,
    LLM,
    PREPROCESSOR,
    Preprocess,
    abort,
    arrived,
    busy,
    create_preprocessor,
    failed,
    failures,
    grant,
    held,
    joins,
    offered_to,
    offers,
    rejected,
    reserved,
    submit,
    vacancy,
)
from tests.preprocess.cases import encoded, noise


def test_no_image_is_offered_before_the_group_has_room_for_the_embeddings_of_all() -> None:
    preprocess = Preprocess("vision-1")
    assert offers(preprocess.play(submit("r", *IMAGES[:2])) + preprocess.play([])) == []
    assert offers(preprocess.play(reserved("r"))) == [("vision-1", 0), ("vision-1", 1)]


def test_an_image_is_kept_until_its_embeddings_arrive_and_only_a_grant_moves_it() -> None:
    preprocess = Preprocess("vision-1")
    sent = preprocess.dispatch("r", *IMAGES[:2])
    plans = [PREPROCESSOR.prepare_item("image", image) for image in IMAGES[:2]]
    for (_, offer), plan in zip(sent, plans, strict=True):
        assert (offer.mm_hash, offer.grid_thw, offer.num_patches, offer.llm) == (
            plan.mm_hash,
            plan.grid_thw,
            plan.num_patches,
            LLM,
        )
    [(receiver, pixels)] = preprocess.play(grant("vision-1", 1))
    assert (receiver, pixels.item) == ("vision-1", 1)
    assert (pixels.patches.numpy() == plans[1].patches()).all()
    assert preprocess.play(arrived(1)) == [] and list(preprocess.handovers[("r", 0)].items) == [0]
    assert preprocess.encoded == []
    assert preprocess.play(arrived(0), arrived(0)) == [] and preprocess.holds_nothing
    assert preprocess.encoded == ["r"], "the gateway is told once"
    assert preprocess.items_left == [1]


def test_the_images_of_a_request_go_to_several_replicas_at_once() -> None:
    preprocess = Preprocess("vision-1", "vision-2", "vision-3")
    assert sorted(offered_to(preprocess.dispatch("r", *IMAGES[:3])).values()) == [
        "vision-1",
        "vision-2",
        "vision-3",
    ]


@pytest.mark.parametrize(
    "data",
    [IMAGES[0], encoded(noise(56, 56, 0), "WEBP", lossless=True)],
    ids=["same file", "other format"],
)
def test_a_known_image_is_offered_to_the_replica_that_has_it(data: bytes) -> None:
    preprocess = Preprocess("vision-1", "vision-2", "vision-3")
    [(first, _)] = offers(preprocess.dispatch("r", IMAGES[0]))
    preprocess.play(grant(first, 0), arrived(0))
    others = [f"vision-{n}" for n in (1, 2, 3) if f"vision-{n}" != first]
    for vision_id in others:  # they are free, the one that has it is full
        preprocess.play(vacancy(vision_id))
    preprocess.play(
        received(first, "vision", Grant(request_id="x", attempt=0, item=0, wait_seconds=5.0))
    )
    assert offers(preprocess.dispatch("r2", data)) == [(first, 0)]
    assert preprocess.play(held(first, 0, "r2"), arrived(0, "r2")) == []
    assert preprocess.holds_nothing


def test_an_image_refused_for_lack_of_room_goes_to_a_replica_with_room() -> None:
    preprocess = Preprocess("vision-1", "vision-2")
    [(first, _)] = offers(preprocess.dispatch("r", IMAGES[0]))
    [(second, _)] = offers(preprocess.play(busy(first, 0, wait=5.0)))
    assert {first, second} == {"vision-1", "vision-2"}
    assert offers(preprocess.play(busy(second, 0, wait=5.0))) == [], "none is asked twice"
    assert offers(preprocess.play(vacancy(first))) == [(first, 0)]


def test_a_full_replica_gets_no_offer_before_it_reports_a_vacancy() -> None:
    preprocess = Preprocess("vision-1")
    assert offers(preprocess.dispatch("r", *IMAGES[:3])) == [("vision-1", 0), ("vision-1", 1)]
    assert (
        offers(preprocess.play(grant("vision-1", 0) + grant("vision-1", 1, has_room=False))) == []
    )
    assert offers(preprocess.play(vacancy("vision-1"))) == [("vision-1", 2)]


def test_a_vacancy_is_declined_if_no_image_waits() -> None:
    assert Preprocess("vision-1").play(vacancy("vision-1")) == [("vision-1", Decline())]


def test_waiting_images_go_to_a_replica_that_appears() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.dispatch("r", *IMAGES[:3])
    preprocess.play(busy("vision-1", 1), busy("vision-1", 2))
    assert offers(preprocess.play(joins("vision-2"))) == [("vision-2", 1), ("vision-2", 2)]


def test_unfinished_images_of_a_lost_replica_go_to_another() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.dispatch("r", *IMAGES[:2])
    preprocess.play(grant("vision-1", 0), grant("vision-1", 1), joins("vision-2"), arrived(0))
    sent = preprocess.play([PeerDown("vision-1", "vision", "gone")])
    assert offers(sent) == [("vision-2", 1)] and failures(sent) == []
    assert preprocess.play(arrived(1)) == [] and preprocess.holds_nothing


def test_a_lost_replica_counts_as_an_attempt_only_if_it_had_the_pixels() -> None:
    preprocess = Preprocess("vision-0")
    preprocess.dispatch("r", IMAGES[0])
    for n in range(2 * MAX_FAILURES):
        [(vision_id, _)] = offers(
            preprocess.play([PeerDown(f"vision-{n}", "vision", "gone")], joins(f"vision-{n + 1}"))
        )
        assert vision_id == f"vision-{n + 1}"


@pytest.mark.parametrize(
    "objection", [rejected(1), failed("vision-1", 1)], ids=["rejected", "failed"]
)
def test_only_the_image_that_failed_goes_to_another_replica(objection: list[Event]) -> None:
    preprocess = Preprocess("vision-1")
    preprocess.dispatch("r", *IMAGES[:2])
    preprocess.play(
        grant("vision-1", 0), grant("vision-1", 1), joins("vision-2", wait_seconds=30.0)
    )
    [(vision_id, offer)] = preprocess.play(objection)
    assert (vision_id, offer.item) == ("vision-2", 1)
    assert offer.skip_cache, "what a cache may have of it is no good"
    [(receiver, pixels)] = preprocess.play(grant("vision-2", 1))
    assert isinstance(pixels, Pixels) and receiver == "vision-2"


def test_an_image_that_fails_everywhere_fails_its_request_by_index_and_cause() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.dispatch("r", *IMAGES[:2])
    for _ in range(MAX_FAILURES - 1):
        assert offers(preprocess.play(grant("vision-1", 1), failed("vision-1", 1))) == [
            ("vision-1", 1)
        ]
    sent = preprocess.play(grant("vision-1", 1), failed("vision-1", 1))
    assert failures(sent) == [("gateway-1", "r", "Internal", 1)]
    error = sent[-1][1]
    assert (
        error.stage == "vision"
        and "image 1" in error.message
        and "the tower failed" in error.message
    )
    assert aborts(sent) == [("vision-1", "r")], "its other image is not wanted any more"
    assert preprocess.holds_nothing and preprocess.play(failed("vision-1", 0)) == []


def lose(vision_id: str) -> list[Event]:
    return [PeerDown(vision_id, "vision", "gone")]


def test_a_request_ends_once_if_several_of_its_images_end_replicas() -> None:
    preprocess = Preprocess("vision-0")
    preprocess.dispatch("r", *IMAGES[:2])
    preprocess.play(grant("vision-0", 0) + grant("vision-0", 1))
    for n in range(1, MAX_DEATHS):
        sent = preprocess.play(lose(f"vision-{n - 1}"), joins(f"vision-{n}"))
        index = offers(sent)[0][1]
        preprocess.play(grant(f"vision-{n}", index))
    sent = preprocess.play(lose(f"vision-{MAX_DEATHS - 1}"), joins("vision-9"))
    [(gateway, request_id, code, item)] = failures(sent)
    assert (gateway, request_id, code, item) == ("gateway-1", "r", "Internal", index)
    [error] = [message for _, message in sent if isinstance(message, Failed)]
    assert error.stage == "vision" and f"image {item}, the last one on this" in error.message
    assert preprocess.holds_nothing and offers(preprocess.play(vacancy("vision-9"))) == []


def test_the_items_of_a_dead_replica_are_retried_apart_and_only_what_is_alone_is_blamed() -> None:
    preprocess = Preprocess("vision-0")
    preprocess.dispatch("poison", IMAGES[0], timeout=600)
    preprocess.dispatch("innocent", IMAGES[1], timeout=600)
    preprocess.play(grant("vision-0", 0, "poison"), grant("vision-0", 0, "innocent"))
    sent = preprocess.play(lose("vision-0"), joins("vision-1"))
    assert [offer.apart for _, offer in sent] == [True, True]
    for n in range(1, MAX_DEATHS):
        preprocess.play(grant(f"vision-{n}", 0, "poison"), busy(f"vision-{n}", 0, "innocent"))
        sent = preprocess.play(lose(f"vision-{n}"), joins(f"vision-{n + 1}"))
    assert failures(sent) == [("gateway-1", "poison", "Internal", 0)]
    assert list(preprocess.handovers) == [("innocent", 0)]
    assert preprocess.handovers["innocent", 0].items[0].num_deaths == 1


@pytest.mark.parametrize("survives", ["vacancy", "grant"])
def test_an_item_that_its_replica_has_survived_is_not_blamed_any_more(survives: str) -> None:
    """The replica took something else, so the item that was alone there is done."""
    preprocess = Preprocess("vision-0")
    preprocess.dispatch("r", *IMAGES[:2])
    preprocess.play(grant("vision-0", 0), lose("vision-0"), joins("vision-1"))
    preprocess.play(grant("vision-1", 0, has_room=False), busy("vision-1", 1))
    preprocess.play(vacancy("vision-1"))
    if survives == "grant":
        preprocess.play(grant("vision-1", 1))
    preprocess.play(lose("vision-1"), joins("vision-2"))
    items = preprocess.handovers["r", 0].items
    assert [item.num_deaths for item in items.values()] == [1, int(survives == "grant")]


def test_an_item_next_to_many_poisons_is_not_given_up() -> None:
    preprocess = Preprocess("vision-0")
    preprocess.dispatch("innocent", IMAGES[0], timeout=600)
    for n in range(2 * MAX_DEATHS):
        preprocess.dispatch(f"poison{n}", IMAGES[1 + n % 7], timeout=600)
        preprocess.play(grant(f"vision-{n}", 0, f"poison{n}"))
        sent = preprocess.play(lose(f"vision-{n}"), joins(f"vision-{n + 1}"))
        assert failures(sent) == []


@pytest.mark.parametrize(
    "late",
    [failed("vision-1", 0), busy("vision-1", 0), grant("vision-1", 0)],
    ids=["failed", "busy", "grant"],
)
def test_reports_about_an_image_that_went_elsewhere_are_ignored(
    late: list[Event],
) -> None:
    preprocess = Preprocess("vision-1")
    preprocess.dispatch("r", IMAGES[0])
    preprocess.play(grant("vision-1", 0), joins("vision-2"))
    assert offers(preprocess.play(failed("vision-1", 0))) == [("vision-2", 0)]
    assert preprocess.play(late) == []
    [(receiver, pixels)] = preprocess.play(grant("vision-2", 0))
    assert isinstance(pixels, Pixels) and receiver == "vision-2"


def test_an_image_whose_pixels_came_too_late_is_offered_again_and_not_counted() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.dispatch("r", IMAGES[0])
    for _ in range(2 * MAX_FAILURES):
        preprocess.play(grant("vision-1", 0), busy("vision-1", 0))
        assert offers(preprocess.play(vacancy("vision-1"))) == [("vision-1", 0)]


def test_an_image_fails_at_once_if_there_never_was_a_replica() -> None:
    preprocess = Preprocess()
    preprocess.play(submit("r", *IMAGES[:2]))
    sent = preprocess.play(reserved("r")) + preprocess.wait(1)
    assert failures(sent) == [("gateway-1", "r", "Unavailable", 0)] and sent[0][1].stage == "vision"
    assert preprocess.holds_nothing


def test_an_image_waits_for_a_replica_that_was_there_a_moment_ago() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.dispatch("r", IMAGES[0])
    assert preprocess.play(grant("vision-1", 0), [PeerDown("vision-1", "vision", "gone")])[1:] == []
    assert preprocess.wait(MISSING_SECONDS - 5) == []
    assert offers(preprocess.play(joins("vision-2"))) == [("vision-2", 0)]


def test_an_image_does_not_wait_for_a_replica_for_ever() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.dispatch("r1", *IMAGES[:2], timeout=600)
    preprocess.dispatch("r2", IMAGES[2], timeout=600)
    preprocess.play(arrived(0, "r1"), [PeerDown("vision-1", "vision", "gone")])
    sent = preprocess.wait(MISSING_SECONDS + 1)
    assert failures(sent) == [
        ("gateway-1", "r1", "Unavailable", 1),
        ("gateway-1", "r2", "Unavailable", 0),
    ]
    assert preprocess.holds_nothing


def test_a_draining_replica_gets_nothing_new_and_keeps_what_it_has() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.dispatch("r", IMAGES[0])
    preprocess.play(grant("vision-1", 0), [PeerDraining("vision-1", "vision")])
    assert preprocess.dispatch("r2", IMAGES[1]) == []
    assert offers(preprocess.play(joins("vision-2"))) == [("vision-2", 0)]
    assert preprocess.play(arrived(0)) == [] and list(preprocess.handovers) == [("r2", 0)]


def test_an_abort_after_the_hand_over_reaches_each_replica_that_has_an_image() -> None:
    preprocess = Preprocess("vision-1", "vision-2", "vision-3")
    held_by = offered_to(preprocess.dispatch("r", *IMAGES[:3]))
    sent = preprocess.play(arrived(1), abort("r"))
    assert sorted(aborts(sent)) == sorted([(held_by[0], "r"), (held_by[2], "r")]) and len(sent) == 2
    assert preprocess.holds_nothing


def test_an_aborted_request_whose_images_wait_is_never_offered() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.dispatch("r", *IMAGES[:3])
    preprocess.play(busy("vision-1", 0), busy("vision-1", 1))
    assert preprocess.play(abort("r")) == []
    assert preprocess.holds_nothing and preprocess.play(vacancy("vision-1")) == [
        ("vision-1", Decline())
    ]


def test_a_request_whose_abort_was_lost_is_freed_after_its_deadline() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.dispatch("r", IMAGES[0], timeout=10)
    assert preprocess.wait(11) == []
    assert aborts(preprocess.wait(5)) == [("vision-1", "r")] and preprocess.holds_nothing


def test_a_grant_for_a_request_that_is_gone_is_answered_by_an_abort() -> None:
    assert Preprocess("vision-1").play(grant("vision-1", 0)) == [
        ("vision-1", Abort(request_id="r", attempt=0))
    ]


def test_a_late_grant_does_not_take_the_requests_other_images_from_the_replica() -> None:
    preprocess = Preprocess("vision-1")
    preprocess.dispatch("r", *IMAGES[:2])
    assert preprocess.play(arrived(0), grant("vision-1", 0)) == []
    assert [type(message) for _, message in preprocess.play(grant("vision-1", 1))] == [Pixels]


def resizing(resizes: bool) -> Preprocessor:
    checkpoint = PREPROCESSOR.checkpoint
    return create_preprocessor(checkpoint, 28 * 28, 28 * 28 * 1000, resizes_oversized=resizes)


LARGE = encoded(noise(28 * 8, 28 * 8))


def test_an_image_too_large_for_every_bucket_is_resized() -> None:
    preprocess = Preprocess("vision-1", buckets=(64, 128), preprocessor=resizing(True))
    [(_, offer)] = preprocess.dispatch("r", LARGE)
    assert 64 < offer.num_patches <= 128


def test_an_image_too_large_for_every_bucket_is_refused_by_name_unless_resized() -> None:
    preprocess = Preprocess("vision-1", buckets=(64, 128), preprocessor=resizing(False))
    sent = preprocess.play(submit("r", IMAGES[0], LARGE))
    assert failures(sent) == [("gateway-1", "r", "TooLarge", 1)]
    assert (
        "image 1" in sent[0][1].message
        and "256 patches" in sent[0][1].message
        and "at most 128" in sent[0][1].message
    )


def test_an_image_is_refused_if_no_bucket_holds_the_models_smallest_size() -> None:
    preprocessor = create_preprocessor(PREPROCESSOR.checkpoint, 28 * 28 * 40, 28 * 28 * 1000)
    sent = Preprocess("vision-1", buckets=(64, 128), preprocessor=preprocessor).play(
        submit("r", LARGE)
    )
    assert failures(sent) == [("gateway-1", "r", "TooLarge", 0)]


def test_an_image_goes_where_it_fits() -> None:
    preprocess = Preprocess("vision-1", buckets=(64,), preprocessor=resizing(True))
    preprocess.play(joins("vision-2", (64, 1024)))
    assert offers(preprocess.dispatch("r", LARGE)) == [("vision-2", 0)]
    assert offers(preprocess.dispatch("r2", encoded(noise(28 * 8, 28 * 8, 1)))) == [("vision-2", 0)]


def test_an_image_whose_bucket_is_gone_fails_and_the_error_names_the_buckets() -> None:
    preprocess = Preprocess("vision-1", buckets=(1024,), preprocessor=resizing(True))
    preprocess.play(joins("vision-2", (64,)))
    preprocess.dispatch("r", LARGE, timeout=600)
    preprocess.play([PeerDown("vision-1", "vision", "gone")])
    sent = preprocess.wait(MISSING_SECONDS + 1)
    assert failures(sent) == [("gateway-1", "r", "Unavailable", 0)]
    assert "256 patches" in sent[0][1].message and "buckets 64" in sent[0][1].message


def test_items_that_are_dispatched_again_are_counted_by_the_reason() -> None:
    preprocess = Preprocess("vision-1")

    def counts() -> list[float | None]:
        read = preprocess.metrics.registry.get_sample_value
        name = "twinlens_preprocess_redispatches_total"
        return [read(name, {"reason": reason}) for reason in ("failed", "rejected", "lost")]

    preprocess.dispatch("r", IMAGES[0])
    assert counts() == [0, 0, 0]
    preprocess.play(grant("vision-1", 0), failed("vision-1", 0))
    assert counts() == [1, 0, 0]
    preprocess.play(grant("vision-1", 0), rejected(0))
    assert counts() == [1, 1, 0]
    preprocess.play(grant("vision-1", 0), [PeerDown("vision-1", "vision", "gone")])
    assert counts() == [1, 1, 1]
