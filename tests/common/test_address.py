"""Host and port as one text, and the address by which others reach this host."""

import socket
import threading
from typing import Any

import pytest

from common import address
from common.address import (
    address_towards,
    bound_socket,
    check_advertised,
    host_port,
    is_wildcard,
    own_address,
)
from common.config import BadSetting


@pytest.mark.parametrize(
    ("host", "written"),
    [
        ("127.0.0.1", "127.0.0.1:80"),
        ("here.example", "here.example:80"),
        ("::1", "[::1]:80"),
        ("::", "[::]:80"),
    ],
)
def test_an_ipv6_address_is_in_brackets(host: str, written: str) -> None:
    assert host_port(host, 80) == written


def test_a_socket_that_cannot_be_bound_is_closed() -> None:
    """A socket left open would raise a warning, which is an error in these tests."""
    with pytest.raises(OSError):
        bound_socket("no.such.host.invalid", 80)


@pytest.mark.parametrize("listen", ["tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://[::]:*"])
def test_every_interface_is_not_an_address_for_others(listen: str) -> None:
    assert is_wildcard(listen)


@pytest.mark.parametrize(
    "listen", ["tcp://127.0.0.1:*", "tcp://10.0.0.1:5555", "ipc:///tmp/0.0.0.0:1"]
)
def test_one_interface_is_an_address_for_others(listen: str) -> None:
    assert not is_wildcard(listen)


def test_own_address_is_the_one_on_the_route_to_the_controller() -> None:
    assert address_towards("127.0.0.1:50050") == "127.0.0.1"
    assert address_towards("localhost:50050") in ("127.0.0.1", "[::1]")
    assert address_towards("unix:/run/control.sock") == "127.0.0.1"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_an_own_ipv6_address_is_in_brackets() -> None:
    assert address_towards("[::1]:50050") == "[::1]"


def test_own_address_waits_until_the_controllers_name_can_be_resolved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This happens to a container that restarts while the controller's is down."""
    answers: list[Any] = [socket.gaierror("Name or service not known"), "172.18.0.5"]

    def once_known(controller: str) -> str:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(address, "address_towards", once_known)
    monkeypatch.setattr(address, "RETRY_SECONDS", 0.0)
    assert own_address("controller:50050", threading.Event()) == "172.18.0.5"


def test_own_address_does_not_wait_after_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()

    def unknown(controller: str) -> str:
        stop.set()
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(address, "address_towards", unknown)
    assert own_address("controller:50050", stop) == ""


@pytest.mark.parametrize(
    "listen", ["tcp://127.0.0.1:5555", "tcp://localhost:*", "tcp://[::1]:5555"]
)
def test_an_advertised_name_that_leads_to_loopback_is_refused(listen: str) -> None:
    with pytest.raises(BadSetting, match="give --listen"):
        check_advertised(listen, "gpu-host")
    for advertise in ("", "127.0.0.1", "localhost"):
        check_advertised(listen, advertise)
    for anywhere in ("tcp://0.0.0.0:5555", "tcp://*:*", "tcp://10.0.0.7:5555", "ipc:///run/v.sock"):
        check_advertised(anywhere, "gpu-host")
