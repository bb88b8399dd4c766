"""The protocol of the connections alone: no socket, no thread, and a clock that the test sets."""

from typing import Any

import pytest

from common.connections import (
    BEAT_SECONDS,
    MAX_INBOX_PEERS,
    MAX_OTHER_PEERS,
    OWN_CONNECTION,
    TOO_MANY,
    Action,
    Admit,
    Allow,
    Close,
    Connections,
    Hold,
    Open,
    Refuse,
    Send,
)
from common.events import PeerDown, PeerDraining, PeerUp, Received
from common.hello import hello
from common.messages import (
    Abort,
    Beat,
    Draining,
    Goodbye,
    Grant,
    Hello,
    Message,
    Peer,
)
from common.progress import LEASE_SECONDS, Progress
from common.wire import Buffer, decode, encode

ABORT = Abort(request_id="r", attempt=1)
GRANT = Grant(request_id="r", attempt=1, item=0)
VISION = Peer("v", "tcp://vision:1")
SENT = Hello | Goodbye | Beat | Draining


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Hangable(Progress):
    """Progress that is hung while `hangs` is set."""

    hangs = False

    def is_hung(self) -> bool:
        return self.hangs

    def age(self) -> float:
        return 7.0


class Side:
    """The protocol of one process, and what it asked for and reported."""

    def __init__(self, clock: Clock, me: Hello) -> None:
        self.clock = clock
        self.progress = Hangable(clock)
        self.connections: Connections[Any] = Connections(me, self.progress, clock)

    def accept(self, peer_id: str, message: Message) -> None:
        """Let a message of this peer, or of a stranger of this name, arrive at the inbox."""
        if peer_id in self.connections:
            self.connections.on_frames(peer_id, encode(message))
        else:
            self.greet(peer_id, message)

    def greet(self, stranger: str, message: Message) -> None:
        """Let the first message of another connection arrive at the inbox."""
        self.connections.on_stranger(stranger, encode(message))

    def actions(self) -> list[Action]:
        """Return the actions since the last call."""
        actions = list(self.connections.actions)
        self.connections.actions.clear()
        return actions

    def sent(self) -> list[tuple[str, Any]]:
        """Return what was sent since the last call, to peers and to strangers that are refused.

        There must be no other actions, except those that admit a stranger.
        """
        sent: list[tuple[str, Any]] = []
        for action in self.actions():
            match action:
                case Send(receiver, frames) | Refuse(receiver, frames):
                    sent.append((receiver, decode(frames, SENT)))
                case _:
                    assert isinstance(action, Admit | Allow), action
        return sent

    def events(self) -> list[Any]:
        """Return the events since the last call."""
        return self.connections.take_events()

    def beat(self, after: float = BEAT_SECONDS) -> None:
        """Let time pass, and then the heartbeat that is due."""
        self.clock.now += after
        assert self.connections.seconds_until_heartbeat() == 0.0
        self.connections.heartbeat()
        self.connections.mark_active()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def vision(clock: Clock) -> Side:
    """The process with the inbox; it knows the preprocess `p`."""
    side = Side(clock, hello("v", "vision"))
    side.accept("p", hello("p", "preprocess"))
    assert side.events() == [PeerUp("p", "preprocess")]
    assert side.sent() == [("p", hello("v", "vision"))]
    return side


@pytest.fixture
def preprocess(clock: Clock) -> Side:
    """The process that opened a connection to the vision replica `v`, which has not answered."""
    side = Side(clock, hello("p", "preprocess"))
    side.connections.connect(VISION, "vision")
    assert side.actions() == [Open(VISION, encode(hello("p", "preprocess")))]
    return side


def answer(preprocess: Side) -> None:
    """Let the vision replica accept the connection."""
    preprocess.connections.on_frames("v", encode(hello("v", "vision")))
    assert preprocess.events() == [PeerUp("v", "vision", VISION.address)]
    assert preprocess.actions() == [Allow("v", 0)], "a replica sends no tensors to preprocess"


# Connecting


def test_an_outgoing_connection_is_up_once_its_peer_answers(preprocess: Side) -> None:
    assert "v" in preprocess.connections
    assert preprocess.events() == []
    answer(preprocess)
    preprocess.connections.on_frames("v", encode(hello("v", "vision")))
    assert preprocess.events() == []
    assert preprocess.actions() == []


def test_a_second_connect_changes_nothing(preprocess: Side) -> None:
    preprocess.connections.connect(VISION, "vision")
    assert preprocess.actions() == []


def test_an_unfit_answer_closes_the_connection(preprocess: Side) -> None:
    preprocess.connections.on_frames("v", encode(hello("v-2", "vision")))
    assert preprocess.actions() == [Close("v")]
    assert preprocess.events() == [PeerDown("v", "vision", "another process has its address")]
    assert "v" not in preprocess.connections


def test_a_message_before_hello_is_refused_without_an_event(vision: Side) -> None:
    vision.accept("x", ABORT)
    ((peer_id, goodbye),) = vision.sent()
    assert peer_id == "x"
    assert "say Hello first" in goodbye.reason
    assert vision.events() == []
    assert "x" not in vision.connections


def test_a_peer_that_says_hello_again_is_dropped(vision: Side) -> None:
    vision.accept("p", hello("p", "preprocess"))
    (down,) = vision.events()
    assert isinstance(down, PeerDown) and "says Hello again" in down.reason
    assert vision.actions() == [Close("p")]


def test_nobody_takes_the_place_of_a_peer_that_lives(vision: Side) -> None:
    vision.greet("thief", hello("p", "preprocess"))
    assert vision.actions() == [Hold("thief")]
    assert vision.events() == []
    vision.greet("second thief", hello("p", "preprocess"))
    ((_, goodbye),) = vision.sent()
    assert goodbye.reason == "another connection waits for this id"
    vision.accept("p", ABORT)
    assert vision.events() == [Received("p", "preprocess", ABORT)]
    vision.connections.on_stranger_gone("thief")
    vision.connections.on_broken("p", "it broke")
    assert vision.events() == [PeerDown("p", "preprocess", "it broke")]
    assert vision.actions() == [Close("p")]


def test_a_peer_that_comes_back_is_admitted_once_its_former_connection_is_down(
    vision: Side,
) -> None:
    vision.greet("again", hello("p", "preprocess"))
    vision.actions()
    vision.connections.on_broken("p", "it broke")
    assert vision.events() == [PeerDown("p", "preprocess", "it broke"), PeerUp("p", "preprocess")]
    closed, admitted, allowed, greeted = vision.actions()
    assert (closed, admitted) == (Close("p"), Admit("again", "p"))
    assert isinstance(allowed, Allow) and isinstance(greeted, Send)


def test_a_peer_that_comes_back_to_a_process_that_hangs_by_then_is_refused(vision: Side) -> None:
    vision.greet("again", hello("p", "preprocess"))
    vision.actions()
    vision.progress.hangs = True
    vision.connections.on_broken("p", "it broke")
    assert vision.events() == [PeerDown("p", "preprocess", "it broke")]
    assert isinstance(vision.actions()[-1], Refuse)


def test_a_stranger_cannot_have_the_id_of_a_member_that_this_process_connects_to(
    clock: Clock,
) -> None:
    leader = Side(clock, hello("llm-0", "llm"))
    follower = Peer("llm-1", "tcp://llm:1")
    leader.connections.connect(follower, "llm")
    leader.actions()
    leader.greet("thief", hello("llm-1", "llm"))
    assert leader.sent() == [("thief", Goodbye(reason=OWN_CONNECTION))]
    assert leader.events() == []


def test_a_process_connects_to_a_member_although_a_thief_has_its_id(clock: Clock) -> None:
    leader = Side(clock, hello("llm-0", "llm"))
    leader.greet("thief", hello("llm-1", "llm"))
    leader.greet("second thief", hello("llm-1", "llm"))
    assert leader.events() == [PeerUp("llm-1", "llm")]
    leader.actions()
    leader.connections.connect(Peer("llm-1", "tcp://llm:1"), "llm")
    refused, closed, opened = leader.actions()
    assert isinstance(refused, Refuse) and refused.stranger == "second thief"
    assert closed == Close("llm-1")
    assert isinstance(opened, Open)
    assert leader.events() == [PeerDown("llm-1", "llm", OWN_CONNECTION)]


@pytest.mark.parametrize("role", ["vision", "llm", "gateway"])
def test_only_roles_that_connect_to_this_one_are_admitted(vision: Side, role: str) -> None:
    vision.greet("x", hello("x", role))
    ((_, goodbye),) = vision.sent()
    assert "does not connect to a vision" in goodbye.reason or "nothing to say" in goodbye.reason
    assert vision.events() == []


def test_a_stranger_with_the_id_of_this_process_is_refused(vision: Side) -> None:
    vision.greet("x", hello("v", "preprocess"))
    assert vision.sent() == [("x", Goodbye(reason="the id in Hello is that of this process"))]


def test_the_number_of_peers_is_bounded_at_the_inbox(clock: Clock) -> None:
    vision = Side(clock, hello("v", "vision"))
    for n in range(MAX_INBOX_PEERS):
        vision.greet(f"p-{n}", hello(f"p-{n}", "preprocess"))
    vision.actions()
    vision.greet("p", hello("p", "preprocess"))
    assert vision.sent() == [("p", Goodbye(reason=TOO_MANY))]


def test_peers_that_messages_name_are_bounded_and_wanted_ones_are_not(clock: Clock) -> None:
    vision = Side(clock, hello("v", "vision"))
    for n in range(2 * MAX_OTHER_PEERS):
        vision.connections.connect(Peer(f"l-{n}", "tcp://x:1"), "llm")
    assert len(vision.actions()) == MAX_OTHER_PEERS
    assert vision.events()[-1] == PeerDown(f"l-{2 * MAX_OTHER_PEERS - 1}", "llm", TOO_MANY)
    vision.connections.keep_connected([(Peer("l", "tcp://x:1"), "llm")])
    assert [type(action) for action in vision.actions()] == [Open]
    for _ in range(1 + int(LEASE_SECONDS / BEAT_SECONDS)):
        vision.beat()
    assert "l-0" not in vision.connections, "it never answered"


@pytest.mark.parametrize("message", [Beat(), GRANT, Draining()])
def test_a_peer_that_does_not_answer_with_hello_first_is_dropped(
    preprocess: Side, message: Message
) -> None:
    preprocess.connections.on_frames("v", encode(message))
    assert preprocess.events() == [PeerDown("v", "vision", "it did not say Hello first")]
    assert preprocess.actions() == [Close("v")]


# Talking


def test_messages_of_the_hop_are_events(vision: Side, preprocess: Side) -> None:
    vision.accept("p", ABORT)
    assert vision.events() == [Received("p", "preprocess", ABORT)]
    answer(preprocess)
    preprocess.connections.on_frames("v", encode(GRANT))
    preprocess.connections.on_frames("v", encode(Draining()))
    assert preprocess.events() == [Received("v", "vision", GRANT), PeerDraining("v", "vision")]


@pytest.mark.parametrize("frames", [[b"nonsense"], encode(ABORT), [b""]])
def test_an_invalid_message_ends_the_connection(preprocess: Side, frames: list[Buffer]) -> None:
    answer(preprocess)
    preprocess.connections.on_frames("v", frames)
    assert preprocess.actions() == [Close("v")]
    (down,) = preprocess.events()
    assert "invalid message" in down.reason


def test_a_goodbye_ends_the_connection_with_its_reason(preprocess: Side) -> None:
    preprocess.connections.on_frames("v", encode(Goodbye(reason="because")))
    assert preprocess.actions() == [Close("v")]
    assert preprocess.events() == [PeerDown("v", "vision", "because")]


def test_draining_is_announced_to_present_and_later_peers_of_the_inbox(
    vision: Side, preprocess: Side
) -> None:
    vision.connections.announce_draining()
    assert vision.sent() == [("p", Draining())]
    vision.accept("p-2", hello("p-2", "preprocess"))
    assert vision.sent() == [("p-2", hello("v", "vision")), ("p-2", Draining())]
    answer(preprocess)
    preprocess.connections.announce_draining()
    assert preprocess.actions() == [], "it opened its connection itself"


# Lease and heartbeat


def test_every_peer_gets_a_heartbeat_each_second(vision: Side) -> None:
    assert vision.connections.seconds_until_heartbeat() == BEAT_SECONDS
    for _ in range(3):
        vision.accept("p", Beat())
        vision.beat()
        assert vision.sent() == [("p", Beat())]
        assert vision.connections.seconds_until_heartbeat() == BEAT_SECONDS
    assert vision.events() == []


def test_a_peer_is_dead_once_it_was_silent_for_longer_than_its_lease(vision: Side) -> None:
    for _ in range(int(LEASE_SECONDS / BEAT_SECONDS)):
        vision.beat()
        assert vision.events() == []
        assert vision.sent() == [("p", Beat())]
    vision.beat()
    assert vision.events() == [PeerDown("p", "preprocess", "no sign of life for 3 s")]
    assert vision.actions() == [Close("p")]


@pytest.mark.parametrize("message", [Beat(), ABORT])
def test_any_message_renews_the_lease(vision: Side, message: Message) -> None:
    for _ in range(10):
        vision.accept("p", message)
        for _ in range(int(LEASE_SECONDS / BEAT_SECONDS)):
            vision.beat()
    assert not any(isinstance(event, PeerDown) for event in vision.events())


def test_a_peer_that_never_answers_is_dead_after_its_lease(preprocess: Side) -> None:
    for _ in range(1 + int(LEASE_SECONDS / BEAT_SECONDS)):
        preprocess.beat()
    assert preprocess.actions()[-1] == Close("v")
    assert preprocess.events() == [PeerDown("v", "vision", "no sign of life for 3 s")]


def test_a_late_heartbeat_does_not_judge_peers_whose_messages_are_unread(vision: Side) -> None:
    vision.beat(after=LEASE_SECONDS + BEAT_SECONDS + 0.5)
    assert vision.events() == []
    assert vision.sent() == [("p", Beat())]
    vision.beat()
    assert vision.events() == [PeerDown("p", "preprocess", "no sign of life for 3 s")]


def test_a_process_that_was_frozen_beyond_its_lease_drops_all_connections(
    vision: Side, preprocess: Side, clock: Clock
) -> None:
    answer(preprocess)
    clock.now += LEASE_SECONDS
    assert not vision.connections.reset_if_frozen()
    assert not preprocess.connections.reset_if_frozen()
    clock.now += 0.01
    assert vision.connections.reset_if_frozen()
    assert preprocess.connections.reset_if_frozen()
    reason = "this process was frozen beyond its lease"
    assert vision.events() == [PeerDown("p", "preprocess", reason)]
    assert vision.actions() == [Close("p")]
    assert preprocess.events() == [PeerDown("v", "vision", reason)]
    assert preprocess.actions() == [Close("v")]
    assert not preprocess.connections.reset_if_frozen()


def test_a_broken_connection_is_a_death_once(preprocess: Side) -> None:
    answer(preprocess)
    for _ in range(2):
        preprocess.connections.on_broken("v", "it broke")
    assert preprocess.actions() == [Close("v")]
    assert preprocess.events() == [PeerDown("v", "vision", "it broke")]


def test_a_wanted_peer_is_connected_to_again_at_the_next_heartbeat(preprocess: Side) -> None:
    preprocess.connections.keep_connected([(VISION, "vision")])
    assert preprocess.actions() == []
    preprocess.connections.on_broken("v", "it broke")
    assert preprocess.actions() == [Close("v")]
    preprocess.beat()
    assert preprocess.actions() == [Open(VISION, encode(hello("p", "preprocess")))]
    preprocess.connections.keep_connected([])
    preprocess.connections.on_broken("v", "it broke")
    preprocess.actions()
    preprocess.beat()
    assert preprocess.actions() == []


# Hanging


def test_a_hung_process_says_so_and_refuses_new_connections(vision: Side) -> None:
    vision.progress.hangs = True
    vision.beat()
    assert vision.sent() == [("p", Beat(hung_seconds=7.0))]
    vision.accept("p-2", hello("p-2", "preprocess"))
    ((_, goodbye),) = vision.sent()
    assert goodbye.reason == "hung: its work loop made no progress for 7 s"
    vision.progress.hangs = False
    vision.accept("p-2", hello("p-2", "preprocess"))
    assert vision.sent() == [("p-2", hello("v", "vision"))]


def test_a_hung_process_opens_no_connection(preprocess: Side) -> None:
    preprocess.progress.hangs = True
    preprocess.connections.on_broken("v", "it broke")
    preprocess.actions()
    preprocess.connections.keep_connected([(VISION, "vision")])
    preprocess.beat()
    assert preprocess.actions() == []
    preprocess.progress.hangs = False
    preprocess.beat()
    assert preprocess.actions() == [Open(VISION, encode(hello("p", "preprocess")))]


def test_a_peer_that_hangs_is_dead(preprocess: Side) -> None:
    answer(preprocess)
    preprocess.connections.on_frames("v", encode(Beat(hung_seconds=7.0)))
    assert preprocess.events() == [
        PeerDown("v", "vision", "hung: its work loop made no progress for 7 s")
    ]
    assert preprocess.actions() == [Close("v")]


def test_a_heartbeat_updates_what_counts_as_a_hang(vision: Side) -> None:
    seen: list[float] = []
    vision.progress.watch = lambda: seen.append(vision.clock.now)  # type: ignore[method-assign]
    vision.beat()
    vision.beat()
    assert seen == [101.0, 102.0]
