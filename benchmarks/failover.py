"""What clients see when one of four encoders is killed at 70 % load.

    python -m benchmarks.failover --proxy PATH/TO/disagg_epd_proxy.py

For each system, a closed loop first measures how many requests a second it answers. Then requests
arrive at random times at 70 % of that rate, once undisturbed, and once with SIGKILL to one encoder
after a third of the time. Both runs have the same arrivals.

Encoders only wait: each takes the same time for every image, one image at a time. Twinlens runs
whole (`twinlens serve --vision 4 --simulate-vision-ms`), with the embedded model. Its launcher
starts a new encoder. Of the other system only the proxy is vLLM's; the servers behind it are
stand-ins of ours (`benchmarks/stand_in.py`), and the language model among them answers at once, so
the first-token times of the two systems compare only with their own undisturbed runs. The proxy
runs with a fixed list of encoders, and again with its dynamic registration, which probes them. A
killed encoder stays away unless --restart says when it comes back. Prints a table, and a last line
of JSON.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.proxied import CannotRun, Proxied
from benchmarks.serving import Serving
from services.commands.bench.figures import level_figures
from services.commands.bench.load import Level, run_level
from services.commands.bench.targets import HttpTarget
from services.commands.bench.workload import Workload

ENCODERS = 4
LOAD = 0.7
CAPACITY_CLIENTS = 4 * ENCODERS
CAPACITY_ROUNDS = 4
TIMEOUT_SECONDS = 60.0
MAX_TOKENS = 8
SIDE = 224


@dataclass(frozen=True)
class System:
    """A running system under test."""

    url: str
    kill: Callable[[], None]
    restart: Callable[[], None] | None
    """What starts the killed encoder again; None if the system does so itself."""


def workload(seed: int) -> Workload:
    return Workload(
        width=SIDE,
        height=SIDE,
        kind="jpeg",
        images_per_request=1,
        same_share=0.0,
        prompt_words=4,
        max_tokens=MAX_TOKENS,
        seed=seed,
    )


async def measure(system: System, options: argparse.Namespace) -> dict[str, Any]:
    requests = workload(time.time_ns() % 2**32).requests()
    async with HttpTarget(system.url, "", TIMEOUT_SECONDS) as target:
        await target.check(next(requests))

        async def run(level: Level, count: int) -> dict[str, Any]:
            prepared = [target.prepare(ask) for ask in islice(requests, count)]
            await run_level(target, prepared, level, lambda _: None)
            return level_figures(level, 1, {})

        full = await run(Level(CAPACITY_CLIENTS, 0.0), CAPACITY_ROUNDS * CAPACITY_CLIENTS)
        rate = LOAD * full["requests_per_second"]
        count = round(rate * options.seconds)
        calm = await run(Level(0, rate, options.seed), count)
        disturbing = asyncio.create_task(disturb(system, options))
        killed = await run(Level(0, rate, options.seed), count)
        await disturbing
    return {
        "capacity_requests_per_second": full["requests_per_second"],
        "rate": rate,
        "undisturbed": brief(calm),
        "killed": brief(killed),
    }


async def disturb(system: System, options: argparse.Namespace) -> None:
    """Kill one encoder after a third of the time, and start it again if that is wanted."""
    await asyncio.sleep(options.seconds / 3)
    system.kill()
    if system.restart and options.restart is not None:
        await asyncio.sleep(options.restart)
        system.restart()


def brief(figures: dict[str, Any]) -> dict[str, Any]:
    names = ("ttft_p50_seconds", "ttft_p99_seconds", "e2e_p99_seconds")
    return {
        "requests": figures["requests"],
        "failed_requests": figures["failed_requests"] + figures["rejected_requests"],
        "failures": figures["failures"],
    } | {name: round(figures[name], 4) for name in names if name in figures}


def twinlens(options: argparse.Namespace) -> dict[str, Any]:
    with Serving(
        *("--vision", str(ENCODERS), "--simulate-vision-ms", str(1000 * options.encode_seconds)),
        *("--embedding-cache-mib", "0", "--log-level", "warning"),
    ) as serving:

        def kill() -> None:
            os.kill(serving.members("vision")[1].pid, signal.SIGKILL)

        url = f"http://127.0.0.1:{serving.http_port}/v1"
        return asyncio.run(measure(System(url, kill, None), options))


def proxied(options: argparse.Namespace, *, is_dynamic: bool) -> dict[str, Any]:
    if options.proxy is None:
        return {"skipped": "no --proxy PATH/TO/disagg_epd_proxy.py"}
    try:
        with Proxied(
            options.proxy,
            options.proxy_python,
            ENCODERS,
            options.encode_seconds,
            is_dynamic=is_dynamic,
        ) as running:
            system = System(running.url, running.kill_encoder, running.restart_encoder)
            return asyncio.run(measure(system, options))
    except CannotRun as e:
        return {"skipped": str(e)}


def show(name: str, found: dict[str, Any]) -> None:
    if reason := found.get("skipped"):
        print(f"{name:<34} skipped: {reason}", flush=True)
        return
    for run in ("undisturbed", "killed"):
        row = found[run]
        times = [
            f"{1000 * row[key]:8.0f}" if key in row else f"{'-':>8}"
            for key in ("ttft_p50_seconds", "ttft_p99_seconds")
        ]
        print(
            f"{name:<34} {run:<12} {found['rate']:6.1f} {row['requests']:9} "
            f"{row['failed_requests']:7} {' '.join(times)}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--proxy", type=Path, help="vLLM's disagg_epd_proxy.py")
    parser.add_argument(
        "--proxy-python",
        default=sys.executable,
        help="a Python with fastapi, uvicorn, uvloop, aiohttp and msgspec, for the proxy",
    )
    parser.add_argument("--encode-seconds", type=float, default=0.4, help="of each image")
    parser.add_argument("--seconds", type=float, default=45.0, help="the length of each run")
    parser.add_argument(
        "--restart", type=float, help="start a stand-in again this many seconds after its death"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the arrivals")
    options = parser.parse_args()
    systems: dict[str, Callable[[], dict[str, Any]]] = {
        "Twinlens": lambda: twinlens(options),
        "vLLM's proxy, fixed list": lambda: proxied(options, is_dynamic=False),
        "vLLM's proxy, dynamic registration": lambda: proxied(options, is_dynamic=True),
    }
    print(f"{'':<34} {'':<12} {'req/s':>6} {'requests':>9} {'failed':>7} TTFT p50, p99 in ms")
    report = {}
    for name, run in systems.items():
        report[name] = run()
        show(name, report[name])
    command = " ".join(["python -m benchmarks.failover", *sys.argv[1:]])
    print(json.dumps({"command": command} | report))


if __name__ == "__main__":
    main()
