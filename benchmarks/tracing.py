"""What tracing costs: systems with and without it, asked in turn in one run.

    python -m benchmarks.tracing [--before DIR]

Each round asks each system the same number of requests, in an order that rotates. The other systems
are idle meanwhile. A request has an image that no request before had, and 64 tokens of answer; a
short one has an image of the cache, and one token. The systems are `off`, without an endpoint, and
`on`, which exports every request to a collector that drops it. With `--before` there is also
`before`: the code in another directory. Prints the medians over all rounds of a round's time and of
the processes' CPU time, as ratios to `off` in the same round, and a last line of JSON.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
from PIL import Image

from benchmarks.processes import cpu_of, with_children
from benchmarks.serving import ROOT, Serving
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc

EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
CLIENTS = 2
TIMEOUT_SECONDS = 60.0
WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Load:
    """What a round asks."""

    requests: int
    max_tokens: int
    is_cached: bool


LOADS = {"usual": Load(6, 64, False), "short": Load(24, 1, True)}


@dataclass
class System:
    """A system, and what each round of each load took it: (seconds, seconds of CPU)."""

    serving: Serving
    pids: list[int]
    stub: Any
    rounds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def measure(self, load: Load, images: list[bytes]) -> tuple[float, float]:
        before = self.cpu_seconds()
        began = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda image: self.ask(load, image), images))
        return time.perf_counter() - began, self.cpu_seconds() - before

    def ask(self, load: Load, image: bytes) -> None:
        request = inference_pb2.GenerateRequest(
            text="OCR:",
            images=[inference_pb2.Image(data=image)],
            sampling=inference_pb2.SamplingParams(temperature=0),
            stopping=inference_pb2.StoppingParams(max_tokens=load.max_tokens, ignore_eos=True),
        )
        answer = self.stub.Generate(request, timeout=TIMEOUT_SECONDS)
        assert answer.usage.completion_tokens == load.max_tokens

    def cpu_seconds(self) -> float:
        return sum(cpu_of(self.pids).by_pid.values())


class Images:
    """The receipt with another corner each time."""

    def __init__(self) -> None:
        self._receipt = Image.open(ROOT / "examples" / "receipt.png").convert("RGB")
        self._number = 0

    def take(self, load: Load) -> list[bytes]:
        return [self._next(load.is_cached) for _ in range(load.requests)]

    def _next(self, is_cached: bool) -> bytes:
        number = 0 if is_cached else self._number + 1
        self._number = max(self._number, number)
        self._receipt.putpixel((0, 0), (number % 256, number // 256, 1))
        file = BytesIO()
        self._receipt.save(file, "PNG")
        return file.getvalue()


@contextmanager
def dropping_collector() -> Iterator[str]:
    """Yield the URL of a collector that does not even read what it gets."""
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
    service, method = EXPORT[1:].split("/")
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(service, {method: handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def start(stack: ExitStack, root: Path, *arguments: str) -> System:
    common = ("--threads", "1", "--log-level", "warning")
    serving = stack.enter_context(Serving(*common, *arguments, root=root))
    pids = with_children(serving.process.pid, set())
    channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{serving.grpc_port}"))
    return System(serving, pids, inference_pb2_grpc.InferenceServiceStub(channel))


def run(options: argparse.Namespace) -> dict[str, Any]:
    images = Images()
    with ExitStack() as stack:
        endpoint = stack.enter_context(dropping_collector())
        systems = {
            "off": start(stack, ROOT),
            "on": start(stack, ROOT, "--otlp-traces-endpoint", endpoint),
        }
        if options.before:
            systems["before"] = start(stack, options.before)
        deadline = time.monotonic() + options.seconds
        number = 0
        while number <= WARM_UP_ROUNDS or time.monotonic() < deadline:
            for name, load in LOADS.items():
                files = images.take(load)
                order = list(systems.values())
                for system in order[number % len(order) :] + order[: number % len(order)]:
                    found = system.measure(load, files)
                    if number >= WARM_UP_ROUNDS:
                        system.rounds.setdefault(name, []).append(found)
            number += 1
    return {name: report(systems, name) for name in LOADS}


def report(systems: dict[str, System], load: str) -> dict[str, Any]:
    """Return the medians of one load."""
    off = systems["off"].rounds[load]
    found: dict[str, Any] = {"rounds": len(off)}
    for name, system in systems.items():
        rounds = system.rounds[load]
        for column, what in enumerate(("seconds", "cpu_seconds")):
            each = [row[column] / LOADS[load].requests for row in rounds]
            ratios = [mine[column] / own[column] for mine, own in zip(rounds, off, strict=True)]
            found[f"{name}_{what}_a_request"] = round(statistics.median(each), 5)
            if name != "off":
                found[f"{name}_{what}_ratio"] = round(statistics.median(ratios), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="directory with the code to compare with")
    parser.add_argument("--seconds", type=float, default=150.0, help="length of the measurement")
    found = run(parser.parse_args())
    for load, values in found.items():
        print(f"\n{load}")
        for name, value in values.items():
            print(f"  {name:<32} {value}")
    print(
        json.dumps({"command": " ".join(["python -m benchmarks.tracing", *sys.argv[1:]])} | found)
    )


if __name__ == "__main__":
    main()
