"""Where the time of one decode step goes: the kernels by their time, and the gaps between them."""

import re
import time
from collections import defaultdict
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.counts import plan_of
from benchmarks.gpu.limits import synchronize
from benchmarks.gpu.part import Task
from benchmarks.gpu.setup import Setup
from services.llm.cuda_model_runner import CudaModelRunner

STEPS = 5
NUM_KERNELS = 15
MAX_NAME_CHARS = 80


def run(task: Task) -> None:
    with Setup(task) as setup:
        checkpoint = setup.checkpoint()
        kind = setup.backends(checkpoint)[0]
        runner = setup.runner(checkpoint, kind)
        for batch in task.sizes.decodes:
            plan = plan_of([1] * batch, task.sizes.decode_context, kind.block_size)
            of_batch(task, setup, runner, batch, plan)


def of_batch(task: Task, setup: Setup, runner: CudaModelRunner, batch: int, plan: Any) -> None:
    def step() -> None:
        runner.execute(plan, []).argmax(-1).tolist()

    step()
    synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    step_ms = (time.perf_counter() - began) * 1e3 / STEPS
    is_card = setup.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_card
    with profile(activities=activities) as recorded:
        for _ in range(STEPS):
            step()
        synchronize()
    spans = spans_of(recorded, is_card)
    busy_ms = sum(end - start for _, start, end in spans) / 1e3 / STEPS
    task.row(
        "Profile of a decode step",
        batch=batch,
        step_ms=step_ms,
        kernels_ms=busy_ms,
        share_of_step=busy_ms / step_ms,
        launches=len(spans) // STEPS,
        gaps_ms=gaps(spans) / 1e3 / STEPS,
        ok=bool(spans),
    )
    for name, (count, microseconds) in longest(spans):
        task.row(
            f"Kernels of a decode step at batch {batch}",
            kernel=shortened(name),
            calls=count // STEPS,
            ms=microseconds / 1e3 / STEPS,
            share_of_kernels=microseconds / 1e3 / STEPS / busy_ms,
        )


def spans_of(recorded: profile, is_card: bool) -> list[tuple[str, float, float]]:
    """Return name, start and end of each kernel in microseconds, in their order.

    On the CPU they are the operations that no other one contains.
    """
    wanted = "CUDA" if is_card else "CPU"
    return sorted(
        (
            (event.name, event.time_range.start, event.time_range.end)
            for event in recorded.events()
            if event.device_type.name == wanted and (is_card or event.cpu_parent is None)
        ),
        key=lambda span: span[1],
    )


def gaps(spans: list[tuple[str, float, float]]) -> float:
    """Return the microseconds between the first start and the last end in which nothing runs."""
    idle = 0.0
    last = spans[0][1] if spans else 0.0
    for _, start, end in spans:
        idle += max(0.0, start - last)
        last = max(last, end)
    return idle


def longest(spans: list[tuple[str, float, float]]) -> list[tuple[str, tuple[int, float]]]:
    """Return the calls and the microseconds of the kernels that take most time, by their names."""
    found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for name, start, end in spans:
        count, microseconds = found[name]
        found[name] = count + 1, microseconds + end - start
    return sorted(found.items(), key=lambda item: -item[1][1])[:NUM_KERNELS]


def shortened(name: str) -> str:
    """Return the name of a kernel without its C++ parameters."""
    name = re.sub(r"<.*", "", name.removeprefix("void "))
    return name[:MAX_NAME_CHARS]
