"""Replicas come, go and are replaced under load, and no request fails."""

import io
import itertools
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import pytest
from PIL import Image

from tests.system.running import Running, ask_about, lives, processes_of, until

pytestmark = pytest.mark.system
CLIENTS = 8
SMALL = ("--dtype", "float32", "--kv-memory", str(64 * 2**20))
_pictures = itertools.count()


def new_picture() -> bytes:
    """A PNG that was never seen before."""
    number = next(_pictures)
    png = io.BytesIO()
    Image.frombytes("RGB", (56, 56), number.to_bytes(4, "big") * (56 * 56 * 3 // 4)).save(
        png, "png"
    )
    return png.getvalue()


class Load:
    """Clients that ask one request after another until the block ends. What they were told is
    counted."""

    def __init__(self, system: Running, with_images: bool = True) -> None:
        self.system = system
        self.with_images = with_images
        self.told: Counter[Any] = Counter()
        self._ended = threading.Event()
        self._news = threading.Condition()
        self._clients = [threading.Thread(target=self._ask_on) for _ in range(CLIENTS)]

    def __enter__(self) -> "Load":
        for client in self._clients:
            client.start()
        self.more(CLIENTS)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        for client in self._clients:
            client.join()
        assert kind is not None or set(self.told) == {200}, self.told

    def more(self, answers: int) -> None:
        """Waits for so many further answers."""
        with self._news:
            wanted = self.told.total() + answers
            assert self._news.wait_for(lambda: self.told.total() >= wanted, timeout=90), self.told

    def _ask_on(self) -> None:
        while not self._ended.is_set():
            messages = (
                ask_about(new_picture())
                if self.with_images
                else [{"role": "user", "content": f"Number {next(_pictures)}?"}]
            )
            try:
                code, answer = self.system.chat(messages, max_tokens=4, ignore_eos=True)
                told: Any = (
                    code
                    if code != 200 or answer["usage"]["completion_tokens"] == 4
                    else "200 without its tokens"
                )
            except Exception as e:  # noqa: BLE001 - whatever it is, it must not end the thread uncounted
                told = repr(e)
            with self._news:
                self.told[told] += 1
                self._news.notify_all()


def in_state(system: Running, role: str, state: str) -> list[dict[str, Any]]:
    return [member for member in system.members(role) if member["state"] == state]


def scale(system: Running, role: str, replicas: int) -> None:
    """Returns when there are as many ready ones and no others."""
    done = system.twinlens("scale", role, str(replicas))
    assert done.returncode == 0, done.stderr
    settled = lambda: len(in_state(system, role, "ready")) == replicas == len(system.members(role))  # noqa: E731
    until(settled, f"{replicas} {role}", 120)


@pytest.fixture(scope="module")
def system() -> Iterator[Running]:
    with Running("--simulate-vision-ms", "60", *SMALL) as running:
        yield running


def test_vision_replicas_come_and_go_under_load(system: Running) -> None:
    with Load(system) as load:
        for replicas in (3, 1, 2, 1):
            scale(system, "vision", replicas)
            load.more(2 * CLIENTS)
    assert len(processes_of(system.process.pid)) == 6


def test_a_wish_that_overtakes_another_is_the_one_that_counts(system: Running) -> None:
    for replicas in (4, 2, 3, 1):
        assert system.twinlens("scale", "vision", str(replicas)).returncode == 0
    until(
        lambda: len(system.members("vision")) == 1 == len(in_state(system, "vision", "ready")),
        "one is left",
    )
    assert len(processes_of(system.process.pid)) == 6


@pytest.mark.parametrize("role", ["preprocess", "detokenizer", "llm"])
def test_every_other_role_scales_under_load(system: Running, role: str) -> None:
    with Load(system) as load:
        scale(system, role, 2)
        load.more(2 * CLIENTS)
        scale(system, role, 1)
        load.more(CLIENTS)


def test_a_member_is_drained_with_its_work_in_hand_and_not_replaced(system: Running) -> None:
    scale(system, "vision", 2)
    with Load(system) as load:
        drained = until(
            lambda: next((m for m in in_state(system, "vision", "ready") if m["in_flight"]), None),
            "one is at work",
        )
        assert system.twinlens("drain", drained["id"]).returncode == 0
        until(lambda: not lives(drained["pid"]), "it has left")
        load.more(2 * CLIENTS)
    assert len(system.members("vision")) == 1
    [last] = system.members("vision")
    refused = system.twinlens("drain", last["id"])
    assert refused.returncode == 1 and "twinlens scale vision 2" in refused.stderr


def test_a_replica_that_gets_sigterm_drains_and_comes_back(system: Running) -> None:
    scale(system, "vision", 2)
    with Load(system) as load:
        terminated = in_state(system, "vision", "ready")[0]["pid"]
        os.kill(terminated, signal.SIGTERM)
        until(lambda: not lives(terminated), "it has left")
        until(lambda: len(in_state(system, "vision", "ready")) == 2, "another came in its place")
        load.more(CLIENTS)
    scale(system, "vision", 1)


def test_the_controller_may_die_and_what_is_wanted_stands(system: Running) -> None:
    scale(system, "vision", 2)
    [controller] = system.members("controller")
    with Load(system) as load:
        os.kill(controller["pid"], signal.SIGKILL)
        load.more(2 * CLIENTS)

        def everyone():
            return {m["role"] for m in in_state(system, "", "ready")} >= {
                "controller",
                "gateway",
                "llm",
            }

        until(
            lambda: system.twinlens("status").returncode == 0 and everyone(),
            "all have joined the new controller",
        )
        until(lambda: len(in_state(system, "vision", "ready")) == 2, "both vision replicas have")
        scale(system, "vision", 1)
        load.more(CLIENTS)
    assert len(processes_of(system.process.pid)) == 6


def test_a_standby_takes_the_place_of_a_replica_that_dies_and_is_refilled() -> None:
    with Running("--simulate-vision-ms", "60", "--vision-standby", "1", *SMALL) as system:
        [active] = in_state(system, "vision", "ready")
        [standby] = in_state(system, "vision", "standby")
        with Load(system) as load:
            assert standby["in_flight"] == standby["queued"] == 0
            os.kill(active["pid"], signal.SIGKILL)
            until(
                lambda: [m["id"] for m in in_state(system, "vision", "ready")] == [standby["id"]],
                "the standby has taken its place",
            )
            until(lambda: in_state(system, "vision", "standby"), "there is a standby again")
            load.more(CLIENTS)


def test_where_images_wait_replicas_are_added_by_themselves() -> None:
    with Running("--simulate-vision-ms", "600", "--autoscale", "vision=1:2", *SMALL) as system:
        refused = system.twinlens("scale", "vision", "2")
        assert refused.returncode == 1 and "--autoscale" in refused.stderr
        with Load(system):
            until(lambda: len(in_state(system, "vision", "ready")) == 2, "there are two", 120)


def test_sigterm_lets_what_is_under_way_end() -> None:
    with Running("--simulate-vision-ms", "1500", *SMALL) as system:
        told: list[Any] = []
        asking = threading.Thread(
            target=lambda: told.append(
                system.chat(ask_about(new_picture()), max_tokens=4, ignore_eos=True)
            )
        )
        asking.start()
        until(
            lambda: any(m["in_flight"] for m in system.members("vision")),
            "the image is being encoded",
        )
        children = processes_of(system.process.pid)
        system.process.send_signal(signal.SIGTERM)
        asking.join()
        assert told[0][0] == 200 and told[0][1]["usage"]["completion_tokens"] == 4
        assert system.process.wait(30) == 0
        assert not any(map(lives, children))
