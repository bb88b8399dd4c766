"""What it costs to send an image's embeddings, compared with a plain ZeroMQ send of the same bytes.

    python -m benchmarks.hop

The sender and the receiver are two processes, as vision and language group are. Links send a typed
message to Links; a plain DEALER sends two frames to a ROUTER. One message is in flight at a time,
and both ways take turns. A time runs from before the call to `send` until the receiver's work loop
has the message, on the clock that both processes share. The receiver's checks are timed separately.
"""

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import zmq

from common.events import PeerUp, Received
from common.hello import hello
from common.links import Links
from common.messages import Embeddings, Peer, VisionToLlm
from common.wire import Tensor, decode, encode

ROWS = 1280
COLUMNS = 3584
"""A large image in a 7B model: 9.2 MB in bfloat16."""
NUM_BUFFERS = 4
CLOCK = time.CLOCK_MONOTONIC
ROUNDS = 200
WARM_UP_ROUNDS = 20


def message(buffer: np.ndarray) -> Embeddings:
    return Embeddings(
        request_id="hop",
        attempt=0,
        item=0,
        mm_hash="0" * 64,
        preprocess_id="p",
        embeddings=Tensor("bfloat16", (ROWS, COLUMNS), buffer.data),
    )


class Receiver:
    """A process that prints its address, then the arrival time of each message."""

    def by_links(self, listen: str) -> None:
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        links = Links(hello("receiver", "llm"), listen, "", events.put)
        print(links.address, flush=True)
        while True:
            event = events.get()
            if isinstance(event, Received) and isinstance(event.message, Embeddings):
                print(time.clock_gettime_ns(CLOCK), flush=True)

    def plain(self, listen: str) -> None:
        socket = zmq.Context.instance().socket(zmq.ROUTER)
        socket.bind(listen)
        print(socket.getsockopt_string(zmq.LAST_ENDPOINT), flush=True)
        while True:
            socket.recv_multipart(copy=False)
            print(time.clock_gettime_ns(CLOCK), flush=True)


class Sender:
    """Starts the receiver; `hop` sends one message and returns the seconds it took."""

    def __init__(
        self, way: str, listen: str, send: Callable[[str], Callable[[np.ndarray], object]]
    ) -> None:
        command = [sys.executable, "-m", "benchmarks.hop", "--receive", way, "--listen", listen]
        self._receiver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._buffers = [
            np.random.default_rng(n).integers(0, 256, 2 * ROWS * COLUMNS, np.uint8)
            for n in range(NUM_BUFFERS)
        ]
        self._send = send(self._line())
        self._turn = 0

    def hop(self) -> float:
        self._turn += 1
        buffer = self._buffers[self._turn % NUM_BUFFERS]
        began = time.clock_gettime_ns(CLOCK)
        self._send(buffer)
        return (int(self._line()) - began) / 1e9

    def close(self) -> None:
        self._receiver.kill()
        self._receiver.communicate()

    def _line(self) -> str:
        assert self._receiver.stdout is not None
        return self._receiver.stdout.readline().strip()


def send_by_links(address: str) -> Callable[[np.ndarray], object]:
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    links = Links(hello("sender", "vision"), "", "", events.put)
    links.connect(Peer("receiver", address), "llm")
    up = events.get(timeout=10)
    assert isinstance(up, PeerUp), up
    return lambda buffer: links.send("receiver", message(buffer))


def send_plain(address: str) -> Callable[[np.ndarray], object]:
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.connect(address)
    return lambda buffer: socket.send_multipart([b"header", buffer.data], copy=False)


def measure(listen: tuple[str, str], rounds: int) -> dict[str, float]:
    """Return the median seconds of both ways, which take turns."""
    ways = {
        "links": Sender("by_links", listen[0], send_by_links),
        "plain": Sender("plain", listen[1], send_plain),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    try:
        for _ in range(rounds + WARM_UP_ROUNDS):
            for way, sender in ways.items():
                seconds[way].append(sender.hop())
    finally:
        for sender in ways.values():
            sender.close()
    return {way: statistics.median(taken[WARM_UP_ROUNDS:]) for way, taken in seconds.items()}


def check_seconds(rounds: int = 50) -> dict[str, float]:
    """Return the median seconds of each check of the receiver.

    It checks the message against its type, and that every element is finite.
    """
    import torch

    frames = encode(message(np.ones(2 * ROWS * COLUMNS, np.uint8)))
    embeddings = torch.ones(ROWS, COLUMNS, dtype=torch.bfloat16)
    checks: dict[str, Callable[[], object]] = {
        "encode": lambda: encode(message(np.empty(2 * ROWS * COLUMNS, np.uint8))),
        "decode": lambda: decode(frames, VisionToLlm),
        "finite": lambda: [bool(bound.isfinite()) for bound in torch.aminmax(embeddings)],
    }
    return {
        name: statistics.median(timed(check) for _ in range(rounds))
        for name, check in checks.items()
    }


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def compare(rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"megabytes": round(2 * ROWS * COLUMNS / 1e6, 1)}
    with tempfile.TemporaryDirectory() as folder:
        transports = {
            "ipc": (f"ipc://{folder}/links", f"ipc://{folder}/plain"),
            "tcp": ("tcp://127.0.0.1:*", "tcp://127.0.0.1:*"),
        }
        for name, listen in transports.items():
            seconds = measure(listen, rounds)
            found[name] = {f"{way}_ms": round(1e3 * taken, 3) for way, taken in seconds.items()}
            found[name]["ratio"] = round(seconds["links"] / seconds["plain"], 2)
    found["checks_ms"] = {
        name: round(1e3 * seconds, 3) for name, seconds in check_seconds().items()
    }
    return found


def show(found: dict[str, Any]) -> None:
    print(f"\nhop of {found['megabytes']} MB of embeddings, median ms")
    print(f"{'transport':10} {'links':>8} {'plain':>8} {'ratio':>7}")
    for name in ("ipc", "tcp"):
        print(
            f"{name:10} {found[name]['links_ms']:8.2f} {found[name]['plain_ms']:8.2f} "
            f"{found[name]['ratio']:7.2f}"
        )
    print(
        "checks:",
        ", ".join(
            f"{name} {milliseconds:.3f}" for name, milliseconds in found["checks_ms"].items()
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--receive", choices=("by_links", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--listen", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.receive:
        getattr(Receiver(), options.receive)(options.listen)
    found = compare(options.rounds)
    show(found)
    print(json.dumps(found))
    os._exit(0)  # does not wait for the threads of the connections


if __name__ == "__main__":
    main()
