"""Host and port as one text."""

import pytest

from common.address import bound_socket, host_port


@pytest.mark.parametrize(
    ("host", "written"), [("127.0.0.1", "127.0.0.1:80"), ("here.example", "here.example:80"), ("::1", "[::1]:80"), ("::", "[::]:80")]
)
def test_an_ipv6_address_is_in_brackets(host: str, written: str) -> None:
    assert host_port(host, 80) == written


def test_a_socket_that_cannot_be_bound_is_closed() -> None:
    """A socket left open would be told of as a warning, which is an error here."""
    with pytest.raises(OSError):
        bound_socket("no.such.host.invalid", 80)
