"""How near the engine comes to what this machine can do.

    python -m benchmarks.engine --checkpoint mid --threads 1

Decode, prefill and vision are compared with their own matrix products and attention calls. All are
timed in turn, round after round in one process, so that other load on the machine affects all
alike. With one thread, its CPU time is counted, which excludes other work on the same core. A
product is timed alone on weights that are together larger than the last-level cache. Every kernel
for it is timed: torch's own, oneDNN's on packed weights, and ours. Prints tables of medians, and a
last line of JSON.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import checkpoints, passes, scheduling
from benchmarks.families import RECIPES
from benchmarks.passes import BLOCK_SIZE, CPU, PICTURES, Case, Pass
from common.checkpoint import Checkpoint, open_checkpoint
from compute.device import Device, choose_dtype
from compute.kernels.library import bfloat16_kernels, cpu_flags
from compute.quantization import check_quantization
from services.llm.model_runner import ModelRunner

BIG = 10**9
ROUNDS = 7
QUICK_ROUNDS = 3
SECONDS_A_TURN = 0.05
INTERESTING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_vnni")


@dataclass
class Measured:
    """The seconds of every case, with one entry for each round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


def measure(cases: dict[str, Case], rounds: int, clock: Callable[[], float]) -> Measured:
    """Time each case in turn, short ones several times a turn.

    A first round warms up, and decides how often a case is repeated.
    """
    repeats = {
        name: max(1, round(SECONDS_A_TURN / timed(case.run, 1, clock)))
        for name, case in cases.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            seconds[name].append(timed(case.run, repeats[name], clock) / case.calls)
    return Measured(seconds)


def timed(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    began = clock()
    for _ in range(repeats):
        run()
    return (clock() - began) / repeats


def report_kernels(measured: Measured, timed_passes: list[Pass]) -> None:
    """Print the median of each kernel for the products and attention calls of every pass."""
    print(f"\n{'call':44} {'kernel':8} {'ms':>9} {'GB/s':>7} {'GFLOPS':>8}")
    for part in {part.name: part for each in timed_passes for part in each.parts}.values():
        for kernel in part.kernels:
            seconds = measured.median(f"{part.name}/{kernel}")
            gigabytes, gigaflops = (
                amount / seconds / BIG for amount in (part.num_bytes, part.num_flops)
            )
            print(
                f"{part.name:44} {kernel:8} {seconds * 1e3:9.3f} {gigabytes:7.1f} {gigaflops:8.0f}"
            )


def summary(measured: Measured, each: Pass, bandwidth: float) -> dict[str, float]:
    """Return the time of a pass, and the shares of it that its calls take when timed alone.

    The shares are computed with the fastest kernels, and with those that the engine uses.
    """
    whole = measured.median(each.name)
    best = sum(
        part.count * min(measured.median(f"{part.name}/{kernel}") for kernel in part.kernels)
        for part in each.parts
    )
    used = sum(part.count * measured.median(f"{part.name}/{part.used}") for part in each.parts)
    linears = [part for part in each.parts if part.is_linear]
    limit = sum(
        part.count * min(measured.median(f"{part.name}/{kernel}") for kernel in part.kernels)
        for part in linears
    )
    weights = sum(part.count * part.num_bytes for part in linears)
    return {
        "ms": round(whole * 1e3, 2),
        "products_at_best_share": round(limit / whole, 3),
        "calls_at_best_share": round(best / whole, 3),
        "calls_as_used_share": round(used / whole, 3),
        "read_bandwidth_share": round(weights / bandwidth / whole, 3),
    }


def report(
    measured: Measured, timed_passes: list[Pass], bandwidth: float
) -> dict[str, dict[str, float]]:
    found = {each.name: summary(measured, each, bandwidth) for each in timed_passes}
    print(f"\n{'pass':28} {'ms':>9}   share of it that is taken by")
    print(
        f"{'':28} {'':>9} {'products':>10} {'and attention':>14} {'as used':>9} "
        f"{'reading the weights once':>25}"
    )
    for name, values in found.items():
        shares = [
            values[key]
            for key in (
                "products_at_best_share",
                "calls_at_best_share",
                "calls_as_used_share",
                "read_bandwidth_share",
            )
        ]
        print(
            f"{name:28} {values['ms']:9.2f} {shares[0]:10.1%} {shares[1]:14.1%} {shares[2]:9.1%} "
            f"{shares[3]:25.1%}"
        )
    return found


def compare_with_bfloat16(
    measured: Measured, decodes: list[Pass], bandwidth: float
) -> dict[str, dict[str, float]]:
    """Print, for each decode with quantized weights, how fast it reads them.

    Next to it stands how much longer the same decode takes with bfloat16 weights.
    """
    found = {}
    print(
        f"\n{'decode with quantized weights':28} {'MB read':>9} {'GB/s':>7} {'of plain':>9} speed"
    )
    for each in decodes:
        seconds = measured.median(each.name)
        num_bytes = sum(part.count * part.num_bytes for part in each.parts)
        ratio = measured.median(unquantized(each.name)) / seconds
        share = num_bytes / seconds / bandwidth
        print(
            f"{each.name:28} {num_bytes / 1e6:9.0f} {num_bytes / seconds / BIG:7.1f} {share:9.0%} "
            f"{ratio:.2f} times bfloat16's"
        )
        found[each.name] = {
            "mb": round(num_bytes / 1e6, 1),
            "gb_per_s": round(num_bytes / seconds / BIG, 2),
            "read_share": round(share, 3),
            "times_bfloat16": round(ratio, 3),
        }
    return found


def unquantized(name: str) -> str:
    """Return the name of the same decode with bfloat16 weights."""
    return f"{name}, bfloat16"


def machine() -> dict[str, object]:
    model = next(
        (line.split(":")[1].strip() for line in cpuinfo() if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [flag for flag in INTERESTING_FLAGS if flag in cpu_flags()],
        "own_kernels": bfloat16_kernels() is not None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        default="mid",
        help=f"{', '.join(RECIPES)} (made if missing), or a model directory",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path.home() / ".cache" / "twinlens" / "checkpoints",
        help="where checkpoints are made",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16")
    )
    parser.add_argument("--quantization", default="auto", choices=("auto", "none", "int8"))
    parser.add_argument(
        "--context",
        type=int,
        default=330,
        help="tokens of a decoding sequence (default: a 448x448 image and a question)",
    )
    parser.add_argument(
        "--decode-only",
        action="store_true",
        help="no prefill and no images: takes minutes even for 3b",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and no large image")
    return parser.parse_args()


def runner_of(
    options: argparse.Namespace, checkpoint: Checkpoint, dtype: torch.dtype, quantization: str
) -> ModelRunner:
    blocks_of_batch = max(passes.BATCHES) * (options.context // BLOCK_SIZE + 4)
    return ModelRunner(
        checkpoint,
        dtype,
        CPU,
        passes.PROMPT_TOKENS // BLOCK_SIZE + blocks_of_batch,
        BLOCK_SIZE,
        quantization=quantization,
    )


def choose_passes(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    runner: ModelRunner | None,
    dtype: torch.dtype,
) -> list[Pass]:
    if runner is None:
        found = passes.of_pooling(checkpoint, dtype)
        return found[:1] if options.quick else found
    found = passes.of_language(runner, checkpoint, dtype, options.context)
    if options.decode_only:
        return found[: len(passes.BATCHES)]
    pictures = list(PICTURES)[: 1 if options.quick else None]
    return found + passes.of_vision(checkpoint, dtype, pictures)


def decodes_of_quantized(timed_passes: list[Pass]) -> list[Pass]:
    """Return the decodes among these passes, if any of their weights are quantized."""
    return [
        each
        for each in timed_passes
        if each.name.startswith("decode")
        and any(part.used in ("int8", "int4") for part in each.parts)
    ]


@torch.inference_mode()
def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(checkpoints.find(options.checkpoint, options.folder))
    dtype = choose_dtype(options.dtype, Device(CPU), checkpoint)
    check_quantization(options.quantization, CPU, dtype)
    conditions = machine() | {
        "quantization": options.quantization,
        "checkpoint": checkpoint.name,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": options.threads,
    }
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))

    decodes = checkpoint.sizes.num_kv_heads > 0
    runner = runner_of(options, checkpoint, dtype, options.quantization) if decodes else None
    timed_passes = choose_passes(options, checkpoint, runner, dtype)
    num_bytes = sum(part.count * part.num_bytes for part in timed_passes[0].parts if part.is_linear)
    cases = {"read": passes.reading(num_bytes)} | {
        case.name: case for each in timed_passes for case in each.cases()
    }
    quantized = decodes_of_quantized(timed_passes)
    if quantized:
        plain = runner_of(options, checkpoint, dtype, "none")
        cases |= {
            unquantized(name): Case(unquantized(name), partial(plain.execute, plan, []))
            for name, plan in passes.decode_plans(checkpoint, options.context).items()
        }
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    measured = measure(cases, QUICK_ROUNDS if options.quick else ROUNDS, clock)

    bandwidth = num_bytes / measured.median("read")
    report_kernels(measured, timed_passes)
    print(
        f"\nplain reading of {num_bytes / BIG:.2f} GB: {bandwidth / BIG:.1f} GB/s (best "
        f"{num_bytes / min(measured.seconds['read']) / BIG:.1f})"
    )
    results: dict[str, object] = {
        "read_gb_per_s": round(bandwidth / BIG, 2),
        "passes": report(measured, timed_passes, bandwidth),
    }
    if quantized:
        results["quantized"] = compare_with_bfloat16(measured, quantized, bandwidth)
    if runner is not None:
        overhead = scheduling.overhead(runner, checkpoint, BLOCK_SIZE, options.context)
        print(f"\nscheduling, planning and sampling at batch 16: {overhead:.2%} of a step")
        results["scheduling_overhead"] = round(overhead, 4)
        one, all_of_them = scheduling.choices(runner, checkpoint, BLOCK_SIZE, options.context)
        print(
            f"prefill with the first token of one answer: {one * 1e3:.1f} ms, with those of "
            f"{scheduling.CHOICES}: {all_of_them * 1e3:.1f} ms"
        )
        results["choices_prefill_ratio"] = round(all_of_them / one, 3)
    print(json.dumps(conditions | results))


if __name__ == "__main__":
    main()
