"""How near simulated vision replicas of 100 ms come to their ideal rate, and CPU time per image.

    python -m benchmarks.pipeline

This measures everything except the models. The language model is a miniature of one layer, made for
this benchmark. Each request asks over gRPC for one token about eight pictures of 224x224. No two
pictures are alike, and none is kept in a cache. For each number of replicas, single requests show
the latency added to the ideal one, then many requests at once show the rate. At the end the system
gets ten times the load that it can serve, to see its memory, and one image's embeddings are sent
alone (`benchmarks/hop.py`). Prints tables, and a last line of JSON.
"""

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, hop
from benchmarks.picture_load import IMAGES_A_REQUEST, Load, Measured, make_requests
from benchmarks.processes import Cpu, cpu_of, resident_bytes
from benchmarks.serving import Serving

REPLICAS = (1, 2, 4, 8, 16, 32)
ENCODE_SECONDS = 0.1
LATENCY_REQUESTS = 8
LEAST_REQUESTS = 16
OVERLOAD_REPLICAS = 4
OVERLOAD_SECONDS = 20.0
OVERLOAD_CLIENTS = 256
OVERLOAD_WAITING = 32
OVERLOAD_REQUESTS = 2 * OVERLOAD_CLIENTS
LOOK_SECONDS = 0.5
# Only the number of vision replicas changes.
ARGUMENTS = ("--preprocess", "2", "--embedding-cache-mib", "0", "--log-level", "warning")


def serving(model: Path, replicas: int, *more: str) -> Serving:
    vision = ("--vision", str(replicas), "--simulate-vision-ms", str(1000 * ENCODE_SECONDS))
    return Serving("--model", str(model), *vision, *ARGUMENTS, *more)


def roles_of(system: Serving) -> dict[int, str]:
    """Return the role of each process, including the launcher, by process id."""
    return {m.pid: m.role for m in system.members()} | {system.process.pid: "launcher"}


async def measure(model: Path, replicas: int, seconds: float) -> dict[str, Any]:
    ideal = replicas / ENCODE_SECONDS
    clients = max(4, replicas // 2)
    requests = make_requests(
        replicas,
        LATENCY_REQUESTS
        + max(LEAST_REQUESTS, math.ceil(seconds * ideal / IMAGES_A_REQUEST))
        + 2 * clients,
    )
    with serving(model, replicas) as system:
        roles = roles_of(system)
        target = f"127.0.0.1:{system.grpc_port}"
        alone = await run_load(target, requests[:LATENCY_REQUESTS], clients=1)
        before = cpu_of([*roles, os.getpid()])
        together = await run_load(target, requests[LATENCY_REQUESTS:], clients)
        used = cpu_of([*roles, os.getpid()])
    images = IMAGES_A_REQUEST * len(together.ends)
    rate = together.images_a_second(skip=2 * clients)
    found = {
        "replicas": replicas,
        "images_a_second": round(rate, 1),
        "ideal": ideal,
        "share": round(rate / ideal, 3),
    }
    return (
        found
        | {"latency": latency(alone, replicas), "codes": dict(together.codes)}
        | cpu(before, used, roles, images)
    )


async def run_load(target: str, requests: list[Any], clients: int) -> Measured:
    load = Load(target)
    try:
        return await load.run(requests, clients)
    finally:
        await load.close()


def latency(alone: Measured, replicas: int) -> dict[str, float]:
    """Return the median milliseconds that single requests take beyond encoding, and where."""
    ideal = math.ceil(IMAGES_A_REQUEST / replicas) * ENCODE_SECONDS
    columns = {
        "added": [seconds - ideal for seconds in alone.seconds],
        "preprocess": [t.preprocess_seconds for t in alone.timings],
        "encode": [
            statistics.mean(i.encode_seconds for i in t.images) - ENCODE_SECONDS
            for t in alone.timings
        ],
        "prefill": [t.prefill_seconds for t in alone.timings],
        # The time outside the stages: the gRPC call, and the hops to preprocess, to the language
        # group, to the detokenizer and back.
        "other hops": [
            seconds - t.preprocess_seconds - t.queue_seconds - t.prefill_seconds
            for seconds, t in zip(alone.seconds, alone.timings, strict=True)
        ],
    }
    if replicas >= IMAGES_A_REQUEST:  # with fewer, an image waits for the one before it
        columns["to vision"] = [
            statistics.mean(i.queue_seconds for i in t.images) for t in alone.timings
        ]
    return {name: round(1e3 * statistics.median(values), 2) for name, values in columns.items()}


def cpu(before: Cpu, after: Cpu, roles: dict[int, str], images: int) -> dict[str, Any]:
    """Return CPU milliseconds per image by role and for all services.

    Also returns the shares of the cores' time that all processes and foreign processes used.
    """
    by_role: dict[str, float] = {}
    for pid, seconds in after.by_pid.items():
        role = roles.get(pid, "client")
        by_role[role] = by_role.get(role, 0.0) + seconds - before.by_pid[pid]
    milliseconds = {role: round(1e3 * seconds / images, 3) for role, seconds in by_role.items()}
    busy = after.busy - before.busy
    idle = after.idle - before.idle
    return {
        "cpu_ms": milliseconds,
        "cpu_ms_services": round(
            sum(ms for role, ms in milliseconds.items() if role != "client"), 3
        ),
        "busy_share": round(busy / (busy + idle), 3),
        "foreign_share": round((busy - sum(by_role.values())) / (busy + idle), 3),
    }


async def overload(model: Path) -> dict[str, Any]:
    """Return the growth in memory under ten times the load that can be served."""
    requests = make_requests(99, OVERLOAD_REQUESTS)
    with serving(model, OVERLOAD_REPLICAS, "--max-waiting", str(OVERLOAD_WAITING)) as system:
        pids = list(roles_of(system))
        load = Load(f"127.0.0.1:{system.grpc_port}")
        enough = asyncio.Event()
        await load.run(requests[:4], clients=1)
        before = resident_bytes(pids)
        peak = 0
        began = time.monotonic()
        asking = asyncio.create_task(load.run(requests[4:], OVERLOAD_CLIENTS, enough))
        while not asking.done() and time.monotonic() < began + OVERLOAD_SECONDS:
            await asyncio.sleep(LOOK_SECONDS)
            peak = max(peak, resident_bytes(pids))
        enough.set()
        measured = await asking
        await load.close()
    served = IMAGES_A_REQUEST * measured.codes["OK"] / (time.monotonic() - began)
    grown = round((peak - before) / 2**20)
    return {
        "clients": OVERLOAD_CLIENTS,
        "codes": dict(measured.codes),
        "images_a_second": round(served, 1),
        "grown_mib": grown,
    }


def show(found: list[dict[str, Any]]) -> None:
    print(
        f"\n{'replicas':>8} {'images/s':>9} {'of ideal':>9} {'CPU ms/image':>13} {'busy':>6} "
        f"{'others':>7}   CPU ms/image by role"
    )
    for row in found:
        by_role = ", ".join(
            f"{role} {ms:.2f}"
            for role, ms in sorted(row["cpu_ms"].items(), key=lambda item: -item[1])
        )
        shares = f"{row['busy_share']:6.0%} {row['foreign_share']:7.0%}"
        print(
            f"{row['replicas']:8} {row['images_a_second']:9.1f} {row['share']:9.1%} "
            f"{row['cpu_ms_services']:13.2f} {shares}   {by_role}"
        )
    print(f"\n{'replicas':>8}   ms added to a request alone, and where")
    for row in found:
        print(
            f"{row['replicas']:8}   "
            + ", ".join(f"{name} {ms:.1f}" for name, ms in row["latency"].items())
        )


def gain(found: list[dict[str, Any]]) -> float | None:
    rates = {row["replicas"]: row["images_a_second"] for row in found}
    return round(rates[4] / rates[1], 2) if {1, 4} <= rates.keys() else None


async def run(options: argparse.Namespace) -> dict[str, Any]:
    model = checkpoints.make("plumbing", options.folder)
    found = [await measure(model, replicas, options.seconds) for replicas in options.replicas]
    show(found)
    report: dict[str, Any] = {"pool": found, "gain_1_to_4": gain(found)}
    if not options.pool_only:
        report["overload"] = await overload(model)
        print(f"\nten times the load: {report['overload']}")
        report["hop"] = hop.compare(hop.ROUNDS)
        hop.show(report["hop"])
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=REPLICAS)
    parser.add_argument(
        "--seconds",
        type=float,
        default=12.0,
        help="seconds of load for each number of replicas, at the ideal rate",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path.home() / ".cache" / "twinlens" / "checkpoints",
        help="where the miniature checkpoint is made",
    )
    parser.add_argument("--pool-only", action="store_true", help="leave out overload and hop")
    report = asyncio.run(run(parser.parse_args()))
    print(
        json.dumps({"command": " ".join(["python -m benchmarks.pipeline", *sys.argv[1:]])} | report)
    )


if __name__ == "__main__":
    main()
