"""What tracing costs: requests with and without it, asked in turn in one run.

    python -m benchmarks.tracing [--before DIR]

Each round asks in each of these ways, in an order that rotates:

- `off`: a system without an endpoint
- `unsampled`: a system that exports to a collector, of requests that are not sampled
- `on`: the same system, of requests that are all sampled
- `before`: the code in another directory, if one is given

The other systems are idle meanwhile. A `usual` request has an image that no request before had, and
64 tokens of answer. A `short` one has an image of the cache, and one token. Prints the medians over
all rounds of a round's time and of the processes' CPU time, the ratios within a round of `on` to
`unsampled` and of `off` to `before`, and a last line of JSON.
"""

import argparse
import json
import os
import secrets
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
RATIOS = {"on": "unsampled", "off": "before"}


@dataclass(frozen=True)
class Load:
    """What a round asks."""

    requests: int
    max_tokens: int
    is_cached: bool


LOADS = {"usual": Load(6, 64, False), "short": Load(24, 1, True)}


@dataclass
class Way:
    """A system and a way to ask it, and what each round of each load took: (seconds, seconds of
    CPU)."""

    pids: list[int]
    stub: Any
    is_sampled: bool = False
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
        traceparent = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"
        metadata = (("traceparent", traceparent),) if self.is_sampled else ()
        answer = self.stub.Generate(request, timeout=TIMEOUT_SECONDS, metadata=metadata)
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


def start(stack: ExitStack, root: Path, *arguments: str) -> Way:
    common = ("--threads", "1", "--log-level", "warning")
    serving = stack.enter_context(Serving(*common, *arguments, root=root))
    pids = with_children(serving.process.pid, set())
    channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{serving.grpc_port}"))
    return Way(pids, inference_pb2_grpc.InferenceServiceStub(channel))


def run(options: argparse.Namespace) -> dict[str, Any]:
    # The client decides which requests are sampled.
    os.environ["OTEL_TRACES_SAMPLER"] = "parentbased_always_off"
    with ExitStack() as stack:
        endpoint = stack.enter_context(dropping_collector())
        unsampled = start(stack, ROOT, "--otlp-traces-endpoint", endpoint)
        ways = {
            "unsampled": unsampled,
            "on": Way(unsampled.pids, unsampled.stub, is_sampled=True),
        }
        if options.before:
            ways["off"] = start(stack, ROOT)
            ways["before"] = start(stack, options.before)
        measure(list(ways.values()), options.loads, options.seconds)
    return {name: report(ways, name) for name in options.loads}


def measure(ways: list[Way], loads: list[str], seconds: float) -> None:
    images = Images()
    deadline = time.monotonic() + seconds
    number = 0
    while number <= WARM_UP_ROUNDS or time.monotonic() < deadline:
        for name in loads:
            first = number % len(ways)
            for way in ways[first:] + ways[:first]:
                found = way.measure(LOADS[name], images.take(LOADS[name]))
                if number >= WARM_UP_ROUNDS:
                    way.rounds.setdefault(name, []).append(found)
        number += 1


def report(ways: dict[str, Way], load: str) -> dict[str, Any]:
    """Return the medians of one load."""
    found: dict[str, Any] = {"rounds": len(ways["on"].rounds[load])}
    for column, what in enumerate(("seconds", "cpu_seconds")):
        for name, way in ways.items():
            each = [row[column] / LOADS[load].requests for row in way.rounds[load]]
            found[f"{name}_{what}_a_request"] = round(statistics.median(each), 5)
        for name, base in RATIOS.items():
            if name in ways:
                pairs = zip(ways[name].rounds[load], ways[base].rounds[load], strict=True)
                ratios = [mine[column] / own[column] for mine, own in pairs]
                found[f"{name}_to_{base}_{what}"] = round(statistics.median(ratios), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="directory with the code to compare with")
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), default=list(LOADS))
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
