"""Fuzz the services in this process: `python -m tests.fuzz --seed 1 --messages 1000000`."""

import argparse
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.fuzz.jobs import BODIES, IMAGES, PROCESSES, TARGETS, Job, run
from tests.fuzz.rounds import Result

PART = 10_000
"""How many messages or bodies one process sends with one seed."""
MAX_SHOWN_FAULTS = 10


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", default="1", help="what is random depends on it only")
    parser.add_argument("--messages", type=int, default=1_000_000, help="to all targets together")
    parser.add_argument("--bodies", type=int, default=100_000, help="of HTTP and gRPC requests")
    parser.add_argument("--images", type=int, default=5000, help="files")
    parser.add_argument(
        "--processes", type=int, default=0, help="messages to the processes of a running system"
    )
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    return parser.parse_args()


def jobs_of(options: argparse.Namespace) -> Iterator[Job]:
    """Yield parts of the work. Each has a seed of its own."""
    counts = {name: options.messages // len(options.targets) for name in options.targets}
    counts |= {BODIES: options.bodies, IMAGES: options.images, PROCESSES: options.processes}
    for name, count in counts.items():
        for part, begin in enumerate(range(0, count, PART)):
            yield name, f"{options.seed}.{part}", min(PART, count - begin)


def show(name: str, result: Result) -> None:
    counts = ", ".join(f"{what} {count:,}" for what, count in sorted(result.counts.items()))
    print(f"{name}: {result.counts.total():,} ({counts}) in {result.seconds:.0f} s")
    for text in result.faults[:MAX_SHOWN_FAULTS]:
        print(f"  FAULT {text}")
    for text, count in result.unforeseen.items():
        print(f"  UNFORESEEN {count} x {text}")


def main() -> int:
    options = parse()
    results: defaultdict[str, Result] = defaultdict(Result)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, spawn) as pool:
        for done in as_completed([pool.submit(run, job) for job in jobs_of(options)]):
            (name, seed, _), result = done.result()
            result.faults = [f"seed {seed}, {fault}" for fault in result.faults]
            results[name].add(result)
    for name, result in results.items():
        show(name, result)
    print(summary(results))
    return int(any(result.faults or result.unforeseen for result in results.values()))


def summary(results: Mapping[str, Result]) -> str:
    """Return the figures of all results in one line."""
    total = Result()
    for result in results.values():
        total.add(result)
    counts = {name: result.counts.total() for name, result in results.items()}
    bodies = counts.pop(BODIES, 0)
    images = counts.pop(IMAGES, 0)
    return (
        f"{sum(counts.values()):,} messages, {bodies:,} bodies, {images:,} images, "
        f"{total.seconds:.0f} s of work, {len(total.faults)} faults, "
        f"{total.unforeseen.total()} unforeseen exceptions"
    )


if __name__ == "__main__":
    sys.exit(main())
