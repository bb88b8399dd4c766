"""ZeroMQ sockets as the connections use them."""

import zmq

from common.wire import MAX_TENSOR_BYTES

COPIED_BYTES = 2**19
"""A frame below that is sent as a copy, which takes less than telling when its memory may go."""


def new_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    # ZeroMQ's high-water mark is no flow control (a ROUTER drops, a DEALER blocks): grants bound what is sent.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_TENSOR_BYTES)
    socket.copy_threshold = COPIED_BYTES
    return socket


def receive_frames(socket: zmq.Socket[bytes]) -> list[zmq.Frame]:
    """One message; zmq.Again where there is none. What recv_multipart does, which asks the socket after every frame for another."""
    frames = [socket.recv(zmq.DONTWAIT, copy=False)]
    while frames[-1].more:
        frames.append(socket.recv(zmq.DONTWAIT, copy=False))
    return frames


def address_of(inbox: zmq.Socket[bytes], advertise: str) -> str:
    """Where others reach it: on the host `advertise`, where one is given."""
    bound = inbox.getsockopt_string(zmq.LAST_ENDPOINT)
    scheme, _, rest = bound.partition("://")
    if scheme != "tcp" or not advertise:
        return bound
    return f"tcp://{advertise}:{rest.rpartition(':')[2]}"
