"""A peer is dead to the others while its work loop hangs, though its connections live."""

import threading
from collections.abc import Iterator

import pytest

from common import connections
from common.events import PeerDown, PeerUp
from common.hello import hello
from common.links import Links
from common.messages import Peer
from common.progress import Progress
from tests.common.test_links import TCP, End, Make, end  # noqa: F401  the fixture


class Hangable(Progress):
    """Progress that is hung while `hangs` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.hangs = threading.Event()

    def is_hung(self) -> bool:
        return self.hangs.is_set()

    def age(self) -> float:
        return 7.0


class HangableEnd(End):
    def __init__(self, member_id: str, role: str, listen: str = "") -> None:
        super().__init__(hello(member_id, role))
        self.links.close()
        self.progress = Hangable()
        self.links = Links(hello(member_id, role), listen, "", self.events.put, self.progress)
        self.peer = Peer(member_id, self.links.address)


@pytest.fixture
def hangable() -> Iterator[Make]:
    made: list[HangableEnd] = []

    def make(member_id: str, role: str, listen: str = "") -> End:
        made.append(HangableEnd(member_id, role, listen))
        return made[-1]

    yield make
    for each in made:
        each.links.close()


def test_a_hung_peer_is_dead_to_the_others_and_reports_that_it_lost_them(
    end: Make,  # noqa: F811
    hangable: Make,
) -> None:
    vision = hangable("v", "vision", TCP)
    preprocess = end("p", "preprocess")
    preprocess.meet(vision)
    assert isinstance(vision, HangableEnd)
    vision.progress.hangs.set()
    assert preprocess.expect(PeerDown).reason == "hung: its work loop made no progress for 7 s"
    vision.expect(PeerDown)  # so it drops what it holds once it reads its events again
    preprocess.connect(vision)
    assert "hung" in preprocess.expect(PeerDown).reason, "it is refused while it hangs"
    vision.progress.hangs.clear()
    preprocess.meet(vision)


def test_a_hung_process_does_not_reconnect(
    end: Make,  # noqa: F811
    hangable: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "BEAT_SECONDS", 0.1)
    vision = end("v", "vision", TCP)
    preprocess = hangable("p", "preprocess")
    assert isinstance(preprocess, HangableEnd)
    preprocess.links.keep_connected([(vision.peer, "vision")])
    preprocess.expect(PeerUp)
    vision.expect(PeerUp)
    preprocess.progress.hangs.set()
    assert "hung" in vision.expect(PeerDown).reason
    preprocess.expect(PeerDown)
    assert vision.stays_quiet(seconds=0.5)
    preprocess.progress.hangs.clear()
    vision.expect(PeerUp)
