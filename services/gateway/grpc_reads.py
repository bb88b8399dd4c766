"""How the gateway takes messages from gRPC clients without holding too many bytes of them.

gRPC does not announce the size of a message, and once it is asked for, grpcio keeps all that comes.
So only a few messages are asked for at a time. A message that is not there soon is counted with the
bytes that its connection has received meanwhile, and gives its turn to the next. The small message
of another client waits for a moment at most, however many large ones are on their way.
"""

import asyncio
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from common.errors import Exhausted, ServingError, TooSlow
from common.grpc_server import Context, bounded, next_message
from services.gateway.body_budget import BodyBudget, Reservation, client_of
from services.gateway.kernel import ReceivedBytes, address_of
from services.gateway.limits import MIN_BODY_BYTES_PER_SECOND

SMALL_MESSAGE_BYTES = 4096
"""The largest message of the methods that manage and watch a system."""
TURN_SECONDS = 0.02
"""How long a message may take to arrive before its bytes are counted."""
MAX_TURNS = 8
"""The most messages that are asked for and not counted yet; a client gets a quarter of them."""
MAX_IN_LINE = 256
"""The most calls of a client that may wait for a turn. For each, gRPC keeps 64 KiB at most."""
SLOW_SECONDS = 20.0
"""How long a message may take at less than MIN_BODY_BYTES_PER_SECOND."""
RETRY_SECONDS = 1.0


@dataclass(eq=False)
class Arrival:
    """A message that was asked for and has not arrived."""

    deadline: asyncio.Timeout
    turns: "ReadTurns"
    counted_from: int | None
    """What the connection had received when the message was asked for, if that is known."""
    began: float = field(default_factory=time.monotonic)
    has_turn: bool = True
    error: ServingError | None = None
    """Why the message was given up."""

    def give_up(self, error: ServingError) -> None:
        self.error = error
        self.deadline.reschedule(asyncio.get_running_loop().time())


@dataclass(eq=False)
class Connection:
    """A connection of a client on which messages are arriving."""

    client: str
    reservation: Reservation
    """Room for what the messages on it have received so far."""
    counted_from: int | None
    """What the connection had received when the first of its messages was asked for."""
    taken: int = 0
    """The bytes of the messages that have arrived since."""
    arrivals: list[Arrival] = field(default_factory=list)


class Body:
    """A message that has arrived, and the room that is reserved for it until the block is left."""

    def __init__(self, data: bytes | None, reservation: Reservation) -> None:
        self.data = data
        self._reservation = reservation

    def __enter__(self) -> bytes | None:
        return self.data

    def __exit__(self, *_error: object) -> None:
        self.data = None
        self._reservation.release()


class ReadTurns:
    """Lets a limited number of calls ask for their message, clients in rotation."""

    def __init__(self, most: int = MAX_TURNS) -> None:
        self._most = most
        self._most_per_client = max(1, most // 4)
        self._taken = Counter[str]()
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}
        """The calls that wait, by client. The first client is the next."""

    async def take(self, client: str) -> None:
        """Wait for a turn.

        Raises
        ------
        Exhausted
            if too many calls of the client wait, or if it takes too long.
        """
        if client not in self._lines and self._has_room(client):
            self._taken[client] += 1
            return
        line = self._lines.setdefault(client, deque())
        if len(line) >= MAX_IN_LINE:
            raise too_many()
        turn = asyncio.get_running_loop().create_future()
        line.append(turn)
        try:
            async with asyncio.timeout(SLOW_SECONDS):
                await turn
        except TimeoutError:
            raise too_many() from None
        finally:
            if turn.cancelled():
                self._leave_line(client, turn)
            elif sys.exception():  # the turn came, and the call ended at the same moment
                self.put_back(client)

    def put_back(self, client: str) -> None:
        """End a turn, and give it to the next client in line."""
        self._taken[client] -= 1
        if not self._taken[client]:
            del self._taken[client]
        for waiting in list(self._lines):
            if self._has_room(waiting) and self._pass_to(waiting):
                return

    def _has_room(self, client: str) -> bool:
        return self._taken.total() < self._most and self._taken[client] < self._most_per_client

    def _pass_to(self, client: str) -> bool:
        """Give a turn to the client's next call, if there is one that was not cancelled."""
        line = self._lines.pop(client)
        while line:
            turn = line.popleft()
            if not turn.done():
                self._taken[client] += 1
                turn.set_result(None)
                if line:
                    self._lines[client] = line
                return True
        return False

    def _leave_line(self, client: str, turn: asyncio.Future[None]) -> None:
        line = self._lines.get(client)
        if line and turn in line:
            line.remove(turn)
            if not line:
                del self._lines[client]


class Reads:
    """The messages that are arriving, and the room that they take."""

    def __init__(
        self,
        budget: BodyBudget,
        max_message_bytes: int,
        received: ReceivedBytes | None = None,
    ) -> None:
        self._budget = budget
        self._max_message_bytes = max_message_bytes
        self._large = ReadTurns()
        self._small = ReadTurns()
        """Turns of the methods with small messages, which never wait for the large ones."""
        self._received = received or ReceivedBytes()
        self._connections: dict[str, Connection] = {}
        self._timer: asyncio.TimerHandle | None = None
        """When bytes are counted next, while messages are arriving."""

    async def receive_small(self, context: Context) -> bytes | None:
        """Return the next message of a call, or None after the last one.

        Raises
        ------
        InvalidRequest
            if the message is larger than SMALL_MESSAGE_BYTES.
        Exhausted, TooSlow
            as `receive`.
        """
        with await self._receive(context, self._small) as data:
            return bounded(data, SMALL_MESSAGE_BYTES)

    async def receive(self, context: Context) -> Body:
        """Return the next message of a call. Its room stays reserved until the body is left.

        Raises
        ------
        Exhausted
            if there is no room for the message.
        TooSlow
            if it arrives too slowly.
        """
        return await self._receive(context, self._large)

    async def _receive(self, context: Context, turns: ReadTurns) -> Body:
        peer = context.peer()
        client = client_name(peer)
        await turns.take(client)
        received = self._received.known(peer)
        connection = self._connections.get(peer)
        if connection is None:
            connection = Connection(client, self._budget.reserve(client, 0), received)
            self._connections[peer] = connection
        arrival = Arrival(asyncio.timeout(None), turns, received)
        connection.arrivals.append(arrival)
        self._count_soon()
        try:
            async with arrival.deadline:
                data = await next_message(context)
        except TimeoutError:
            assert arrival.error
            raise arrival.error from None
        finally:
            self._end_turn(connection, arrival)
            connection.arrivals.remove(arrival)
            if not connection.arrivals:
                connection.reservation.release()
                del self._connections[peer]
        return self._body(connection, data)

    def _body(self, connection: Connection, data: bytes | None) -> Body:
        size = len(data or b"")
        connection.taken += size
        counted = connection.reservation.num_bytes
        connection.reservation.release()
        body = Body(data, self._budget.reserve(connection.client, size))
        if connection.arrivals:
            connection.reservation.grow(max(0, counted - size))
        return body

    def _end_turn(self, connection: Connection, arrival: Arrival) -> None:
        if arrival.has_turn:
            arrival.has_turn = False
            arrival.turns.put_back(connection.client)

    # Counting what has not arrived yet

    def _count_soon(self, seconds: float = TURN_SECONDS) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._count)

    def _count(self) -> None:
        """Count the bytes on each connection whose message takes long, and end its turn."""
        self._timer = None
        now = time.monotonic()
        late = {
            peer: connection
            for peer, connection in self._connections.items()
            if now - connection.arrivals[0].began >= TURN_SECONDS
        }
        try:
            if unknown := {peer for peer in late if self._received.known(peer) is None}:
                self._received.find(unknown)
            for peer, connection in late.items():
                self._count_connection(connection, self._received.known(peer), now)
        finally:
            if self._connections:
                # Counting takes a tenth of the time at most, however many connections there are.
                self._count_soon(max(TURN_SECONDS, 10 * (time.monotonic() - now)))

    def _count_connection(self, connection: Connection, received: int | None, now: float) -> None:
        most = self._max_message_bytes * len(connection.arrivals)
        if received is None:
            held = most
        else:
            if connection.counted_from is None:
                connection.counted_from = max(0, received - most)
            held = max(0, received - connection.counted_from - connection.taken)
        self._reserve(connection, held)
        for arrival in connection.arrivals:
            if arrival.counted_from is None:
                arrival.counted_from = received
            age = now - arrival.began
            if age >= TURN_SECONDS:
                self._end_turn(connection, arrival)
            if age >= SLOW_SECONDS and is_slow(arrival, received, age):
                arrival.give_up(too_slow())

    def _reserve(self, connection: Connection, num_bytes: int) -> None:
        """Reserve this many bytes for the connection, or give up its last message."""
        reservation = connection.reservation
        before = reservation.num_bytes
        reservation.release()
        try:
            reservation.grow(num_bytes)
        except Exhausted as error:
            reservation.grow(before)
            connection.arrivals[-1].give_up(error)


def is_slow(arrival: Arrival, received: int | None, age: float) -> bool:
    """Return whether too little has come since the message was asked for."""
    if received is None or arrival.counted_from is None:
        return True
    return received - arrival.counted_from < MIN_BODY_BYTES_PER_SECOND * age


def client_name(peer: str) -> str:
    """Return the name under which a peer shares what is limited, from its name in gRPC."""
    address = address_of(peer)
    return client_of(address[0]) if address else peer


def too_many() -> Exhausted:
    reason = "too many messages are being received: try again in a moment"
    return Exhausted(reason, "gateway", retry_after=RETRY_SECONDS, cause="body_bytes")


def too_slow() -> TooSlow:
    least = MIN_BODY_BYTES_PER_SECOND // 1024
    return TooSlow(f"the message comes too slowly: send at least {least} KiB per second", "gateway")
