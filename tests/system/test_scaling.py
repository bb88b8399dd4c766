"""Replicas are added, removed and replaced under load, and no request fails."""

import io
import itertools
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import pytest
from PIL import Image

from common.membership import READY, STANDBY
from tests.system.running import Running, ask_about, lives, processes_of, until

pytestmark = pytest.mark.system
CLIENTS = 8
NUM_IN_FLIGHT = 6
ANSWER = {"max_tokens": 4, "ignore_eos": True}
SMALL = ("--dtype", "float32", "--kv-memory", str(64 * 2**20))
_pictures = itertools.count()


def new_picture() -> bytes:
    """Return a PNG that no request had before."""
    number = next(_pictures)
    png = io.BytesIO()
    Image.frombytes("RGB", (56, 56), number.to_bytes(4, "big") * (56 * 56 * 3 // 4)).save(
        png, "png"
    )
    return png.getvalue()


class Load:
    """Clients that send one request after another until the with block ends, and count the answers.

    Fails at the end if any answer was not a whole one.
    """

    def __init__(self, system: Running) -> None:
        self.system = system
        self.outcomes: Counter[int | str] = Counter()
        self._ended = threading.Event()
        self._counted = threading.Condition()
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
        assert kind is not None or set(self.outcomes) == {200}, self.outcomes

    def more(self, answers: int) -> None:
        """Wait for this number of further answers."""
        with self._counted:
            wanted = self.outcomes.total() + answers
            assert self._counted.wait_for(lambda: self.outcomes.total() >= wanted, timeout=90), (
                self.outcomes
            )

    def _ask_on(self) -> None:
        while not self._ended.is_set():
            outcome = self._ask()
            with self._counted:
                self.outcomes[outcome] += 1
                self._counted.notify_all()

    def _ask(self) -> int | str:
        """Return the status of a whole answer, or what was wrong."""
        try:
            status, answer = self.system.chat(ask_about(new_picture()), **ANSWER)
        except Exception as e:  # noqa: BLE001 - no error may end the thread uncounted
            return repr(e)
        is_short = status == 200 and answer["usage"]["completion_tokens"] != ANSWER["max_tokens"]
        return "200 without its tokens" if is_short else status


def is_settled(system: Running, role: str, replicas: int) -> bool:
    """Whether this number of replicas are ready, and there are no others."""
    return len(system.in_state(role, READY)) == replicas == len(system.members(role))


def scale(system: Running, role: str, replicas: int) -> None:
    """Scale a role, and return when it is settled."""
    done = system.twinlens("scale", role, str(replicas))
    assert done.returncode == 0, done.stderr
    until(lambda: is_settled(system, role, replicas), f"{replicas} {role}", 120)


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


def test_the_last_of_several_scalings_counts(system: Running) -> None:
    for replicas in (4, 2, 3, 1):
        assert system.twinlens("scale", "vision", str(replicas)).returncode == 0
    until(lambda: is_settled(system, "vision", 1), "one is left")
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
            lambda: next((m for m in system.in_state("vision", READY) if m.in_flight), None),
            "one is at work",
        )
        assert system.twinlens("drain", drained.id).returncode == 0
        until(lambda: not lives(drained.pid), "it has left")
        load.more(2 * CLIENTS)
    assert len(system.members("vision")) == 1
    [last] = system.members("vision")
    refused = system.twinlens("drain", last.id)
    assert refused.returncode == 1 and "twinlens scale vision 2" in refused.stderr


def test_a_replica_that_gets_sigterm_drains_and_comes_back(system: Running) -> None:
    scale(system, "vision", 2)
    with Load(system) as load:
        terminated = system.in_state("vision", READY)[0].pid
        os.kill(terminated, signal.SIGTERM)
        until(lambda: not lives(terminated), "it has left")
        until(lambda: len(system.in_state("vision", READY)) == 2, "another replica took its place")
        load.more(CLIENTS)
    scale(system, "vision", 1)


def has_joined(system: Running) -> bool:
    """Whether the controller, a gateway and a language group are ready."""
    ready = {member.role for member in system.in_state("", READY)}
    return system.twinlens("status").returncode == 0 and ready >= {"controller", "gateway", "llm"}


def test_the_controller_may_die_and_what_is_wanted_stands(system: Running) -> None:
    scale(system, "vision", 2)
    [controller] = system.members("controller")
    with Load(system) as load:
        os.kill(controller.pid, signal.SIGKILL)
        load.more(2 * CLIENTS)

        until(lambda: has_joined(system), "all have joined the new controller")
        until(lambda: len(system.in_state("vision", READY)) == 2, "both vision replicas have")
        scale(system, "vision", 1)
        load.more(CLIENTS)
    assert len(processes_of(system.process.pid)) == 6


def test_a_standby_takes_the_place_of_a_replica_that_dies_and_is_refilled() -> None:
    with Running("--simulate-vision-ms", "60", "--vision-standby", "1", *SMALL) as system:
        [active] = system.in_state("vision", READY)
        [standby] = system.in_state("vision", STANDBY)
        with Load(system) as load:
            assert standby.in_flight == standby.queued == 0
            os.kill(active.pid, signal.SIGKILL)
            until(
                lambda: [m.id for m in system.in_state("vision", READY)] == [standby.id],
                "the standby has taken its place",
            )
            until(lambda: system.in_state("vision", STANDBY), "there is a standby again")
            load.more(CLIENTS)


@pytest.fixture(scope="module")
def autoscaled() -> Iterator[Running]:
    with Running("--simulate-vision-ms", "600", "--autoscale", "vision=1:2", *SMALL) as running:
        yield running


def test_autoscaling_adds_replicas_while_images_wait(autoscaled: Running) -> None:
    refused = autoscaled.twinlens("scale", "vision", "2")
    assert refused.returncode == 1 and "--autoscale" in refused.stderr
    with Load(autoscaled):
        until(lambda: len(autoscaled.in_state("vision", READY)) == 2, "there are two", 120)


def test_sigterm_lets_requests_in_flight_end(autoscaled: Running) -> None:
    """Ends the shared system: no other test may come after it."""
    with ThreadPoolExecutor(NUM_IN_FLIGHT) as pool:
        asked = [
            pool.submit(autoscaled.chat, ask_about(new_picture()), **ANSWER)
            for _ in range(NUM_IN_FLIGHT)
        ]
        until(
            lambda: any(m.in_flight for m in autoscaled.members("vision")),
            "an image is being encoded",
        )
        children = processes_of(autoscaled.process.pid)
        autoscaled.process.send_signal(signal.SIGTERM)
        answers = [one.result() for one in asked]
    assert [status for status, _ in answers] == [200] * NUM_IN_FLIGHT
    assert all(answer["usage"]["completion_tokens"] == 4 for _, answer in answers)
    assert autoscaled.process.wait(30) == 0
    assert not any(map(lives, children))
