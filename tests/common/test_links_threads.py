"""Many threads send at once in both directions. Nothing is lost, and order is kept per thread."""

import queue
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common import connections
from common.events import PeerUp, Received
from common.hello import hello
from common.links import Links
from common.messages import Abort, Grant, Peer

NUM_THREADS = 4
NUM_MESSAGES = 400
DEADLINE = 60.0

Ends = tuple[Links, "queue.SimpleQueue[Any]"]


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[Ends, Ends]]:
    inboxes: tuple[queue.SimpleQueue[Any], queue.SimpleQueue[Any]] = (
        queue.SimpleQueue(),
        queue.SimpleQueue(),
    )
    vision = Links(hello("v", "vision"), f"ipc://{tmp_path}/inbox", "", inboxes[0].put)
    preprocess = Links(hello("p", "preprocess"), "", "", inboxes[1].put)
    preprocess.connect(Peer("v", vision.address), "vision")
    for inbox in inboxes:
        assert isinstance(inbox.get(timeout=DEADLINE), PeerUp)
    yield (vision, inboxes[0]), (preprocess, inboxes[1])
    preprocess.close()
    vision.close()


def send_many(links: Links, peer_id: str, make: Any) -> list[threading.Thread]:
    def send(thread: int) -> None:
        for n in range(NUM_MESSAGES):
            links.send(peer_id, make(request_id=str(thread), attempt=n))

    threads = [threading.Thread(target=send, args=(thread,)) for thread in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    return threads


def received(inbox: "queue.SimpleQueue[Any]") -> dict[str, list[int]]:
    """Return the numbers of each thread's messages in the order of arrival."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for _ in range(NUM_THREADS * NUM_MESSAGES):
        event = inbox.get(timeout=DEADLINE)
        assert isinstance(event, Received), event
        found[event.message.request_id].append(event.message.attempt)
    return found


def test_threads_that_send_at_once_lose_nothing(ends: tuple[Ends, Ends]) -> None:
    (vision, at_vision), (preprocess, at_preprocess) = ends
    threads = send_many(preprocess, "v", Abort)
    threads += send_many(vision, "p", lambda **name: Grant(**name, item=0))
    wanted = {str(thread): list(range(NUM_MESSAGES)) for thread in range(NUM_THREADS)}
    assert received(at_vision) == wanted
    assert received(at_preprocess) == wanted
    for thread in threads:
        thread.join()


def test_a_message_that_arrives_during_a_send_does_not_wait_for_the_next_heartbeat(
    ends: tuple[Ends, Ends], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer arrives while its receiver sends, which may consume the signal of its arrival."""
    monkeypatch.setattr(connections, "BEAT_SECONDS", 10 * DEADLINE)
    (vision, at_vision), (preprocess, at_preprocess) = ends
    for n in range(NUM_MESSAGES):
        vision.send("p", Grant(request_id="r", attempt=n, item=0))
        preprocess.send("v", Abort(request_id="r", attempt=n))
        assert at_preprocess.get(timeout=DEADLINE).message.attempt == n
        assert at_vision.get(timeout=DEADLINE).message.attempt == n
