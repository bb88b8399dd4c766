"""ZeroMQ sockets as the connections use them."""

from collections.abc import Sequence

import zmq

from common.wire import MAX_TENSOR_BYTES, Buffer

# Plain numbers: arithmetic of enumerations takes longer than the question itself.
EVENTS = int(zmq.EVENTS)
POLLIN = int(zmq.POLLIN)
AT_ONCE = int(zmq.DONTWAIT)
NOT_THE_LAST = int(zmq.DONTWAIT | zmq.SNDMORE)

COPIED_BYTES = 2**19
"""A frame below that is sent as a copy, which takes less than telling when its memory may go."""


def new_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    # ZeroMQ's high-water mark is no flow control (a ROUTER drops, a DEALER blocks): grants bound
    # what is sent.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_TENSOR_BYTES)
    socket.copy_threshold = COPIED_BYTES
    return socket


def send_frames(socket: zmq.Socket[bytes], frames: Sequence[Buffer]) -> None:
    """One message; never waits."""
    *first, last = frames
    for frame in first:
        socket.send(frame, NOT_THE_LAST, copy=False)
    socket.send(last, AT_ONCE, copy=False)


def receive_frames(socket: zmq.Socket[bytes]) -> list[zmq.Frame]:
    """One message; zmq.Again where there is none. What recv_multipart does, which asks the socket
    after every frame for another."""
    frames = [socket.recv(AT_ONCE, copy=False)]
    while frames[-1].more:
        frames.append(socket.recv(AT_ONCE, copy=False))
    return frames


def has_message(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.getsockopt(EVENTS)) & POLLIN)


def address_of(inbox: zmq.Socket[bytes], advertise: str) -> str:
    """Where others reach it: on the host `advertise`, where one is given."""
    bound = inbox.getsockopt_string(zmq.LAST_ENDPOINT)
    scheme, _, rest = bound.partition("://")
    if scheme != "tcp" or not advertise:
        return bound
    return f"tcp://{advertise}:{rest.rpartition(':')[2]}"
