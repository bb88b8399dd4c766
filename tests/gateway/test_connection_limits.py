"""HTTP connections are limited so that no client's keep another client's out."""

import resource

import pytest

from services.gateway.connection_limits import (
    ConnectionLimits,
    Standing,
    num_connections_allowed,
)


class Connection:
    """A connection that has come this far."""

    def __init__(self, standing: Standing) -> None:
        self.standing = standing
        self.is_evicted = False

    def evict(self) -> None:
        self.is_evicted = True


def fill(
    limits: ConnectionLimits, client: str, count: int, standing: Standing = Standing.WAITING
) -> list[Connection]:
    """Add as many connections of the client as find room, of this many."""
    added = []
    for _ in range(count):
        if limits.make_room(client):
            added.append(Connection(standing))
            limits.add(client, added[-1])
    return added


def test_a_client_gets_half_of_what_the_others_leave() -> None:
    limits = ConnectionLimits(64)
    assert [len(fill(limits, client, 100)) for client in "abcde"] == [32, 16, 8, 4, 2]


def test_a_limit_for_each_client_can_be_set() -> None:
    limits = ConnectionLimits(64, 3)
    assert [len(fill(limits, client, 100)) for client in "ab"] == [3, 3]


def test_the_oldest_connection_without_a_request_gives_way() -> None:
    limits = ConnectionLimits(8)
    waiting = fill(limits, "a", 2)
    idle = fill(limits, "a", 2, Standing.SENDING_HEAD)
    assert len(fill(limits, "a", 1)) == 1
    assert [connection.is_evicted for connection in waiting + idle] == [False, False, True, False]


def test_a_newcomer_displaces_one_of_the_client_with_the_most() -> None:
    limits = ConnectionLimits(8)
    sending = fill(limits, "a", 4, Standing.SENDING_BODY)
    fill(limits, "b", 2)
    fill(limits, "c", 1)
    assert len(fill(limits, "d", 1)) == 1
    assert [connection.is_evicted for connection in sending] == [True, False, False, False]


def test_connections_that_are_answered_never_give_way() -> None:
    limits = ConnectionLimits(2)
    [waiting] = fill(limits, "a", 1)
    assert not fill(limits, "a", 1) and not fill(limits, "b", 1) and not waiting.is_evicted
    limits.remove("a", waiting)
    limits.remove("a", waiting)
    assert fill(limits, "b", 1)


@pytest.mark.parametrize(
    ("descriptors", "allowed"),
    [(256, 96), (65, 1), (20, 1), (10**6, 4096), (resource.RLIM_INFINITY, 4096)],
)
def test_connections_take_half_of_the_descriptors(
    monkeypatch: pytest.MonkeyPatch, descriptors: int, allowed: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (descriptors, descriptors))
    assert num_connections_allowed(4096) == allowed
