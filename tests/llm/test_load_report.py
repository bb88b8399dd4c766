"""How busy the group is reaches every preprocess: when it connects, when it changes, and not for
every step."""

from common.messages import Adapter, Adapters, LlmLoad
from services.llm.load_report import REPORT_SECONDS, LoadReport
from services.llm.lora_registry import LoraRegistry, Resident
from tests.fakes import FakeLinks
from tests.llm.builders import BLOCK_SIZE, create_request, create_scheduler


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_who_connects_is_told_at_once() -> None:
    links = FakeLinks()
    registry = LoraRegistry([Resident(1, "a", "/a", b"identity")])
    LoadReport(links, create_scheduler(num_blocks=10), registry).add("preprocess-1")
    assert links.sent == [
        ("preprocess-1", Adapters(adapters=(Adapter("a", "/a"),))),
        ("preprocess-1", LlmLoad(0, 0, 10 * BLOCK_SIZE, 10 * BLOCK_SIZE)),
    ]


def test_a_change_is_told_once_and_not_more_often_than_now_and_then() -> None:
    links = FakeLinks()
    clock = Clock()
    scheduler = create_scheduler(num_blocks=10)
    report = LoadReport(links, scheduler, LoraRegistry(), clock)
    for peer_id in ("preprocess-1", "preprocess-2"):
        report.add(peer_id)
    report.send_changes(at_once=False)
    links.take()
    scheduler.add(create_request("r"))
    report.send_changes(at_once=False)
    assert links.take() == []
    clock.now += REPORT_SECONDS
    report.send_changes(at_once=False)
    report.send_changes(at_once=False)
    assert [(peer_id, load.waiting) for peer_id, load in sorted(links.take())] == [
        ("preprocess-1", 1),
        ("preprocess-2", 1),
    ]


def test_a_group_that_is_about_to_wait_tells_at_once() -> None:
    links = FakeLinks()
    clock = Clock()
    scheduler = create_scheduler(num_blocks=10)
    report = LoadReport(links, scheduler, LoraRegistry(), clock)
    report.add("preprocess-1")
    report.send_changes(at_once=True)
    scheduler.add(create_request("r"))
    report.send_changes(at_once=True)
    _, load = links.take()[-1]
    assert load.waiting == 1


def test_who_is_gone_is_told_nothing() -> None:
    links = FakeLinks()
    scheduler = create_scheduler(num_blocks=10)
    report = LoadReport(links, scheduler, LoraRegistry())
    report.add("preprocess-1")
    report.remove("preprocess-1")
    links.take()
    scheduler.add(create_request("r"))
    report.send_changes(at_once=True)
    assert links.take() == []
