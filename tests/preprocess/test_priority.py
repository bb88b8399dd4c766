"""Urgent work goes first in every queue of preprocess; equals keep the order of their arrival."""

from collections import OrderedDict
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from common.events import PeerDown, PeerUp
from common.messages import Offer, Prompt
from services.preprocess.priority import enqueue
from tests.preprocess.builders import IMAGES, LLM, Preprocess, reserved, submit
from tests.preprocess.test_vision_pool import Pool, dispatched


@dataclass
class Waiting:
    priority: int


@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), max_size=30))
def test_a_queue_is_sorted_by_priority_and_then_by_place(added: list[tuple[int, bool]]) -> None:
    queue: OrderedDict[int, Waiting] = OrderedDict()
    model: list[int] = []
    for key, (priority, first) in enumerate(added):
        enqueue(queue, key, Waiting(priority), first)
        model.insert(0 if first else len(model), key)
        model.sort(key=lambda key: added[key][0])
        assert list(queue) == model


def test_urgent_images_are_offered_first() -> None:
    pool = Pool()
    items = [dispatched(content) for content in range(4)]
    for item, priority in zip(items, (0, 5, 0, -1), strict=True):
        item.priority = priority
        pool.add(item)
    pool.join("a")
    offered = []
    while found := pool.offers():
        offered += [content for _, content in found]
        pool.on_answer("a", True, 0.0)
    assert offered == [3, 0, 2, 1]


def test_an_urgent_request_is_handed_over_before_those_that_wait_for_a_group() -> None:
    preprocess = Preprocess()
    preprocess.play([PeerDown(LLM.id, "llm", "killed")])
    for name, priority in (("a", 1), ("b", 0), ("c", 1)):
        preprocess.play(submit(name, priority=priority))
    sent = preprocess.play([PeerUp(LLM.id, "llm", LLM.address)])
    assert [m.request_id for _, m in sent if isinstance(m, Prompt)] == ["b", "a", "c"]


def test_prompt_and_offer_carry_the_priority() -> None:
    preprocess = Preprocess("v1")
    sent = preprocess.play(submit("r", IMAGES[0], priority=-3))
    sent += preprocess.play(reserved("r"))
    carried = [m.priority for _, m in sent if isinstance(m, Prompt | Offer)]
    assert carried == [-3, -3]
