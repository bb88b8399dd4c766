"""The gateway knows the adapters of all groups, and loads and unloads them."""

import asyncio
from typing import Any

import pytest

from common.errors import InvalidRequest, NotFound, Unavailable
from common.events import PeerDown, Received
from common.messages import (
    Adapter,
    AdapterChanged,
    Adapters,
    LoadAdapter,
    UnloadAdapter,
)
from tests.gateway.builders import Gateway, error_of, failed, request


class AdaptedGateway(Gateway):
    """A gateway whose groups report and change adapters."""

    def report(self, group: str, *names: str) -> None:
        adapters = tuple(Adapter(name, f"/{name}") for name in names)
        self.receive(group, Adapters(adapters=adapters))

    def receive(self, group: str, message: Any) -> None:
        self.core.on_event(Received(group, "llm", message))

    def answer(self, group: str, code: str = "", reason: str = "") -> None:
        """Answer the last load or unload that the group was sent."""
        asked = [m for m in self.links.to(group) if isinstance(m, LoadAdapter | UnloadAdapter)]
        self.receive(group, AdapterChanged(task=asked[-1].task, code=code, reason=reason))

    async def start(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        await asyncio.sleep(0)
        return task


def test_a_request_names_the_model_or_an_adapter() -> None:
    gateway = AdaptedGateway()
    gateway.report("llm-1", "a", "b")
    assert [gateway.core.check_model(name) for name in (None, "", "tiny", "a")] == ["", "", "", "a"]
    with pytest.raises(NotFound, match="served: 'tiny', 'a', 'b'"):
        gateway.core.check_model("c")


def test_adapters_are_known_while_the_only_group_restarts() -> None:
    gateway = AdaptedGateway()
    gateway.report("llm-1", "a")
    gateway.core.on_event(PeerDown("llm-1", "llm", "gone"))
    assert gateway.core.check_model("a") == "a"
    gateway.regain("llm", 2)
    assert gateway.core.check_model("a") == "a", "it has reported nothing yet"
    gateway.report("llm-2")
    with pytest.raises(NotFound):
        gateway.core.check_model("a")


async def test_an_adapter_is_loaded_into_all_groups_and_into_those_that_come_later() -> None:
    gateway = AdaptedGateway(replicas=2)
    adapters = gateway.core.adapters
    loading = await gateway.start(adapters.load("a", "x"))
    gateway.answer("llm-1")
    await asyncio.sleep(0)
    assert not loading.done()
    gateway.answer("llm-2")
    await loading
    assert adapters.paths() == {"a": "x"}
    gateway.links.take()
    gateway.core.on_event(PeerDown("llm-1", "llm", "gone"))
    gateway.regain("llm", 3)
    [load] = [m for m in gateway.links.to("llm-3") if isinstance(m, LoadAdapter)]
    assert (load.name, load.path, load.replace) == ("a", "x", False)


async def test_if_one_group_cannot_load_it_the_others_unload_it() -> None:
    gateway = AdaptedGateway(replicas=2)
    loading = await gateway.start(gateway.core.adapters.load("a", "x"))
    gateway.answer("llm-1")
    gateway.answer("llm-2", "InvalidRequest", "no directory x")
    with pytest.raises(InvalidRequest, match="no directory x"):
        await loading
    assert [m.name for m in gateway.links.to("llm-1") if isinstance(m, UnloadAdapter)] == ["a"]
    assert gateway.core.adapters.paths() == {}


async def test_a_group_that_dies_meanwhile_is_not_waited_for() -> None:
    gateway = AdaptedGateway(replicas=2)
    loading = await gateway.start(gateway.core.adapters.load("a", "x"))
    gateway.answer("llm-1")
    gateway.core.on_event(PeerDown("llm-2", "llm", "gone"))
    await loading
    loading = await gateway.start(gateway.core.adapters.load("b", "x"))
    gateway.core.on_event(PeerDown("llm-1", "llm", "gone"))
    with pytest.raises(Unavailable):
        await loading
    with pytest.raises(Unavailable, match="no llm is connected"):
        await gateway.core.adapters.load("b", "x")


async def test_what_was_unloaded_through_another_gateway_is_not_loaded_again() -> None:
    gateway = AdaptedGateway()
    loading = await gateway.start(gateway.core.adapters.load("a", "x"))
    gateway.report("llm-1", "a")
    gateway.answer("llm-1")
    await loading
    gateway.report("llm-1")
    gateway.links.take()
    gateway.regain("llm", 2)
    assert gateway.links.of(LoadAdapter) == []
    assert gateway.core.adapters.paths() == {}


async def test_an_unload_reaches_all_groups_and_fails_if_none_has_it() -> None:
    gateway = AdaptedGateway(replicas=2)
    for codes in (("", "NotFound"), ("NotFound", "NotFound")):
        unloading = await gateway.start(gateway.core.adapters.unload("a"))
        for group, code in zip(("llm-1", "llm-2"), codes, strict=True):
            gateway.answer(group, code, "no adapter")
        if codes[0]:
            with pytest.raises(NotFound):
                await unloading
        else:
            await unloading


async def test_a_request_waits_for_its_adapter_unless_that_was_unloaded() -> None:
    gateway = AdaptedGateway(retry_seconds=1000.0)
    gateway.report("llm-1", "a")
    async with gateway.core.generate(request(adapter="a")) as events:
        assert gateway.submitted()[-1][1].adapter == "a"
        gateway.on_event(failed("Unavailable"))
        gateway.report("llm-1", "a", "b")
        assert len(gateway.submitted()) == 2, "a report is a reason to try again"
        gateway.report("llm-1")
        gateway.on_event(failed("Unavailable", attempt=1))
        error = await error_of(events)
        assert isinstance(error, NotFound) and "unloaded" in error.message


@pytest.mark.parametrize("name", ["", "a\rb", "\x89", "x" * 200])
async def test_a_name_that_no_adapter_can_have_reaches_no_group(name: str) -> None:
    gateway = AdaptedGateway()
    with pytest.raises(InvalidRequest):
        await gateway.core.adapters.unload(name)
    assert not gateway.links.to("llm-1")
