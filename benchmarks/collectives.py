"""An all-reduce between ranks on one host's CPUs: gloo compared with shared memory.

    python -m benchmarks.collectives --tp 2

Prints the median microseconds of each at the sizes of a decode step and of a prefill chunk, and a
last line of JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.multiprocessing as mp

from services.llm import parallel

SIZES = {
    "decode, hidden 896": (1, 896),
    "decode, hidden 3584": (1, 3584),
    "16 rows, hidden 3584": (16, 3584),
    "1024 rows, hidden 896": (1024, 896),
}
ROUNDS = 5
REPEATS = 40


def measure(
    rank: int, tp: int, rendezvous: str, results: "mp.SimpleQueue[dict[str, dict[str, float]]]"
) -> None:
    torch.set_num_threads(1)
    shared = parallel.join_group(rank, tp, rendezvous, torch.device("cpu"), 1024 * 896).all_reduce
    found: dict[str, dict[str, float]] = {}
    for name, shape in SIZES.items():
        part = torch.randn(shape)
        times: dict[str, list[float]] = {"gloo": [], "shared memory": []}
        for _ in range(ROUNDS):
            times["gloo"] += timed(lambda part=part: parallel.all_reduce(part.clone()))
            times["shared memory"] += timed(lambda part=part: shared(part))
        found[name] = {kind: statistics.median(values) * 1e6 for kind, values in times.items()}
    if rank == 0:
        results.put(found)


def timed(call: Callable[[], object]) -> list[float]:
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", type=int, default=2)
    tp = parser.parse_args().tp
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (tp, f"file://{folder}/meet", results), nprocs=tp)
    found = results.get()
    print(
        f"{'all-reduce of float32':<24} {'gloo':>10} {'shared':>10}   microseconds, median of "
        f"{ROUNDS * REPEATS}, {tp} ranks"
    )
    for name, times in found.items():
        print(f"{name:<24} {times['gloo']:>10.0f} {times['shared memory']:>10.0f}")
    print(json.dumps({"tp": tp, "microseconds": found}))


if __name__ == "__main__":
    main()
