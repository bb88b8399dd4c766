"""How many bytes of bodies the gateway holds for requests that are not admitted yet."""

from ipaddress import IPv6Address, ip_address
from types import TracebackType

from common.errors import Exhausted
from services.gateway.fair_share import Shares
from services.gateway.limits import MAX_HELD_BODY_BYTES, SMALL_BODY_BYTES

RETRY_SECONDS = 1.0


class Reservation:
    """Room for the body of one request, until it is released."""

    def __init__(self, budget: "BodyBudget", client: str) -> None:
        self._budget = budget
        self._client = client
        self.num_bytes = 0
        """The bytes of the body so far, or those that its length announces."""

    def grow(self, num_bytes: int) -> None:
        """Reserve this many bytes more.

        Raises
        ------
        Exhausted
            if they do not fit. What was reserved before stays reserved.
        """
        counted = counted_bytes(self.num_bytes + num_bytes) - counted_bytes(self.num_bytes)
        self._budget.take(self._client, counted)
        self.num_bytes += num_bytes

    def release(self) -> None:
        """Return all that was reserved. Another call has no effect."""
        self._budget.put_back(self._client, counted_bytes(self.num_bytes))
        self.num_bytes = 0

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class BodyBudget:
    """Reserves room for bodies, so that no number of clients makes the gateway hold more.

    Clients share it as `Shares` says. Small bodies are not counted: the number of connections
    bounds them. All calls are made on the event loop.
    """

    def __init__(self, total_bytes: int = MAX_HELD_BODY_BYTES) -> None:
        self._shares = Shares(total_bytes)

    @property
    def num_held(self) -> int:
        """The counted bytes that are reserved at present."""
        return self._shares.num_held

    def reserve(self, address: str, num_bytes: int) -> Reservation:
        """Return room for a body of this size from this address.

        Raises
        ------
        Exhausted
            if it does not fit.
        """
        reservation = Reservation(self, client_of(address))
        reservation.grow(num_bytes)
        return reservation

    def take(self, client: str, num_bytes: int) -> None:
        """Count bytes for the client, or raise Exhausted."""
        if num_bytes == 0:
            return
        wanted, share = self._shares.wanted_and_share(client, num_bytes)
        if wanted > share:
            raise Exhausted(
                "too many bytes of requests are being received: try again in a moment",
                "gateway",
                retry_after=RETRY_SECONDS,
                cause="body_bytes",
            )
        self._shares.add(client, num_bytes)

    def put_back(self, client: str, num_bytes: int) -> None:
        """Stop counting bytes for the client."""
        self._shares.remove(client, num_bytes)


def counted_bytes(num_bytes: int) -> int:
    """Return how much of the budget a body of this size takes."""
    return num_bytes if num_bytes > SMALL_BODY_BYTES else 0


def client_of(address: str) -> str:
    """Return the name under which an address shares a budget.

    An IPv6 client commonly has a network of 64 bits, so that is what shares. An IPv4 address that
    is written as an IPv6 one is itself. What is not an IP address, such as the path of a Unix
    socket, is its own name.
    """
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if not isinstance(ip, IPv6Address):
        return address
    if ip.ipv4_mapped:
        return str(ip.ipv4_mapped)
    return f"{IPv6Address(int(ip) >> 64 << 64)}/64"
