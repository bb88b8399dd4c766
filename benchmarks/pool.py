"""The routing policy alone, in simulated time: what a decision costs, and how far it is from ideal.

    python -m benchmarks.pool --replicas 1 8 64 200 1000 --preprocess 1 8 100

Preprocess and vision decide with their real code; the tower, the connections and the language group
are simulated (`pool_simulation.py`). The ideal is one central queue that knows everything and whose
messages take no time (`pool_loads.py`). The CPU times are those of this machine; everything else is
the same for a seed.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import structlog

from benchmarks.pool_loads import (
    Spec,
    arrivals,
    equal_fleet,
    ideal,
    mixed_fleet,
)
from benchmarks.pool_simulation import simulate
from common.messages import LlmLoad, Peer
from proto.twinlens.control.v1 import control_pb2
from services.controller.service import ControlServicer, JoinStream
from services.preprocess.llm_groups import LlmGroups
from services.preprocess.prepared import ExpandedPrompt

SATURATED = 100.0
FLEETS: dict[str, Callable[[int], list[Spec]]] = {"equal": equal_fleet, "mixed": mixed_fleet}
COLUMNS = (
    *("fleet", "replicas", "preprocess", "load", "wait ms", "ideal ms", "of ideal rate"),
    *("preprocess us", "vision us", "messages", "offers"),
)
NUM_CHOICES = 300
ITEMS_PER_REPLICA = 5


def main() -> None:
    arguments = parse_arguments()
    # The services log every item at the level debug, which would be most of the time.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    print(line(COLUMNS))
    rows = []
    for fleet, replicas, preprocess, load in cases(arguments):
        row = measure(fleet, replicas, preprocess, load, arguments.items, arguments.seed)
        print(line(cells(row)), flush=True)
        rows.append(row)
    others = [control_plane(count) for count in arguments.replicas]
    print("\nmembers  group us  list ms")
    for other in others:
        print(f"{other['members']:7}{other['group_us']:10.1f}{other['list_ms']:9.2f}")
    print(json.dumps({"routing": rows, "control": others}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "benchmarks.pool", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 8, 64, 200, 1000])
    parser.add_argument("--preprocess", type=int, nargs="+", default=[1, 8, 100])
    parser.add_argument(
        "--load",
        type=float,
        nargs="+",
        default=[0.7, 0.9, SATURATED],
        help="arrivals as a share of the fleet's rate; far above 1, all items are there at once",
    )
    parser.add_argument("--fleet", choices=FLEETS, nargs="+", default=["equal", "mixed"])
    parser.add_argument(
        "--items", type=int, default=1000, help="the fewest items, if five a replica are fewer"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small fleet, for a test")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.replicas = [8]
        arguments.preprocess = [2, 10]
        arguments.items = 100
    return arguments


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, int, int, float]]:
    """Yield what to simulate. There are never more preprocesses than replicas."""
    for fleet in arguments.fleet:
        for replicas in arguments.replicas:
            counts = [count for count in arguments.preprocess if count <= replicas]
            if arguments.quick:
                counts = arguments.preprocess
            for preprocess in counts:
                for load in arguments.load:
                    yield fleet, replicas, preprocess, load


def measure(
    fleet_name: str, replicas: int, preprocess: int, load: float, least_items: int, seed: int
) -> dict[str, Any]:
    """Return one row of the table. Times in milliseconds and CPU microseconds for each item."""
    fleet = FLEETS[fleet_name](replicas)
    items = arrivals(fleet, preprocess, load, max(least_items, ITEMS_PER_REPLICA * replicas), seed)
    finished, costs = simulate(fleet, preprocess, items)
    best = ideal(fleet, items)
    return {
        "fleet": fleet_name,
        "replicas": replicas,
        "preprocess": preprocess,
        "load": load,
        "wait_ms": round(1000 * float(np.mean(finished.waits)), 2),
        "ideal_ms": round(1000 * float(np.mean(best.waits)), 2),
        "of_ideal_rate": round(best.bulk_seconds / finished.bulk_seconds, 3),
        "preprocess_us": round(1e6 * costs.preprocess / len(items), 1),
        "vision_us": round(1e6 * costs.vision / len(items), 1),
        "messages": round(sum(costs.messages.values()) / len(items), 2),
        "offers": round(costs.messages["Offer"] / len(items), 2),
    }


def cells(row: dict[str, Any]) -> list[str]:
    values = dict(row)
    if values["load"] >= 2:
        values |= {"load": "full", "wait_ms": "", "ideal_ms": ""}
    else:
        values["of_ideal_rate"] = ""
    return [str(value) for value in values.values()]


def line(texts: Sequence[str]) -> str:
    return " ".join(text.rjust(len(name) + 1) for text, name in zip(texts, COLUMNS, strict=True))


def control_plane(count: int) -> dict[str, Any]:
    """Return what one choice among this number of language groups costs, and one list of members.

    The controller makes a list for each of those that watch after every change.
    """
    return {
        "members": count,
        "group_us": round(1e6 * group_seconds(count), 1),
        "list_ms": round(1e3 * list_seconds(count), 3),
    }


def group_seconds(count: int) -> float:
    groups = LlmGroups()
    for n in range(count):
        groups.add(Peer(f"llm-{n}", "ipc:///x"))
        groups.update_load(f"llm-{n}", LlmLoad(running=n % 7, waiting=0, free_tokens=10**6))
    prompts = [prompt_of(n) for n in range(NUM_CHOICES)]
    began = time.thread_time()
    for prompt in prompts:
        groups.choose(prompt, [])
    return (time.thread_time() - began) / NUM_CHOICES


def prompt_of(number: int) -> ExpandedPrompt:
    """Return a prompt of 640 tokens. Some begin with the same 320."""
    random = np.random.default_rng(number)
    shared = np.random.default_rng(number % 20)
    ids = np.concatenate([shared.integers(0, 1000, 320), random.integers(0, 1000, 320)])
    return ExpandedPrompt(ids, np.zeros((1, 640), np.int64), 0, np.zeros((0, 2), np.int64))


def list_seconds(count: int) -> float:
    """Return the CPU seconds of the controller to make and encode a list of all members."""
    servicer = ControlServicer(control_pb2.Member(id="controller", role="controller"))
    for n in range(count):
        member = control_pb2.Member(
            id=f"vision-{n:06}",
            role="vision",
            address=f"tcp://10.0.{n // 250}.{n % 250}:5555",
            state=control_pb2.MEMBER_STATE_READY,
            fingerprint="f" * 64,
            host=f"host-{n}",
        )
        servicer._table.report(member, 0.0)
    stream = JoinStream(control_pb2.JoinRequest(watch=True))
    began = time.thread_time()
    for _ in range(10):
        servicer._response(stream).SerializeToString()
    return (time.thread_time() - began) / 10


if __name__ == "__main__":
    main()
