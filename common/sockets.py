"""ZeroMQ sockets, set up and used as the connections between processes need them."""

from collections.abc import Sequence

import zmq

from common.wire import MAX_TENSOR_BYTES, Buffer

Socket = zmq.Socket[bytes]

# Plain numbers, because arithmetic with zmq's enumerations takes longer than the call itself.
EVENTS = int(zmq.EVENTS)
POLLIN = int(zmq.POLLIN)
DONTWAIT = int(zmq.DONTWAIT)
DONTWAIT_SNDMORE = int(zmq.DONTWAIT | zmq.SNDMORE)

COPIED_BYTES = 2**19
"""Smaller frames are copied, which takes less time than tracking when their memory is free."""
NEVER_MS = 24 * 3600 * 1000


def new_socket(context: zmq.Context[Socket], kind: int) -> Socket:
    """Return a socket with the limits that all sockets of the connections share."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    # ZeroMQ's high-water mark is not flow control (a ROUTER drops, a DEALER blocks). What is sent
    # is bounded by grants.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_TENSOR_BYTES)
    socket.copy_threshold = COPIED_BYTES
    return socket


def new_inbox(context: zmq.Context[Socket]) -> Socket:
    """Return a ROUTER for the peers that connect to this process, not yet bound."""
    socket = new_socket(context, zmq.ROUTER)
    # Without this option, a message to a peer that is gone is dropped silently.
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # A peer may connect again under its old id.
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    return socket


def new_dealer(context: zmq.Context[Socket], identity: str) -> tuple[Socket, Socket]:
    """Return a DEALER, not yet connected, and a monitor that is readable once it is broken."""
    socket = new_socket(context, zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, identity.encode())
    # ZeroMQ must not reconnect, because a broken connection is a death. -1 means never, but with it
    # a break discards messages that arrived and are not read yet, and makes sending fail.
    socket.setsockopt(zmq.RECONNECT_IVL, NEVER_MS)
    monitor = socket.get_monitor_socket(
        zmq.EVENT_DISCONNECTED
        | zmq.EVENT_CLOSED
        | zmq.EVENT_CONNECT_RETRIED
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    )
    return socket, monitor


def send_frames(socket: Socket, frames: Sequence[Buffer]) -> None:
    """Send one message, without waiting."""
    *first, last = frames
    for frame in first:
        socket.send(frame, DONTWAIT_SNDMORE, copy=False)
    socket.send(last, DONTWAIT, copy=False)


def receive_frames(socket: Socket) -> list[zmq.Frame]:
    """Return the frames of one message, without waiting.

    `recv_multipart` does the same, but asks the socket after every frame whether there is another.

    Raises
    ------
    zmq.Again
        if there is no message.
    """
    frames = [socket.recv(DONTWAIT, copy=False)]
    while frames[-1].more:
        frames.append(socket.recv(DONTWAIT, copy=False))
    return frames


def has_message(socket: Socket) -> bool:
    """Whether a message can be received. Asking also resets the socket's file descriptor."""
    return bool(int(socket.getsockopt(EVENTS)) & POLLIN)


def address_of(inbox: Socket, advertise: str) -> str:
    """Return the address that others connect to: with the host `advertise`, unless it is empty."""
    bound = inbox.getsockopt_string(zmq.LAST_ENDPOINT)
    scheme, _, rest = bound.partition("://")
    if scheme != "tcp" or not advertise:
        return bound
    return f"tcp://{advertise}:{rest.rpartition(':')[2]}"
