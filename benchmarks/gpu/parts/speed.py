"""Decode, prefill and vision of the 7B shape, next to what the card can do."""

import math
import statistics
import time
from functools import partial

import torch

from benchmarks.gpu.counts import decode_bytes, plan_of, prefill_operations, vision_operations
from benchmarks.gpu.engine import filled_engine
from benchmarks.gpu.limits import Limits, measure_limits, median_seconds
from benchmarks.gpu.part import Task
from benchmarks.gpu.setup import Setup
from common.checkpoint import Checkpoint
from services.llm.cuda_model_runner import CudaModelRunner
from services.llm.step_plan import StepPlan
from services.vision.families import load
from services.vision.families.qwen2_5_vl import VisionConfig
from services.vision.graphed_tower import GraphedTower
from services.vision.tower_thread import ItemShape

OVERHEAD_STEPS = 20


def run(task: Task) -> None:
    with Setup(task) as setup:
        sizes = task.sizes
        limits = measure_limits(setup.device, sizes.buffer_bytes, sizes.matrix_size, sizes.rounds)
        task.row(
            "Limits",
            memory_GB_per_second=limits.bytes_per_second / 1e9,
            products_TFLOPS=limits.operations_per_second / 1e12,
        )
        checkpoint = setup.checkpoint()
        of_vision(task, setup, checkpoint, limits)
        of_language(task, setup, checkpoint, limits)


def speed_row(
    task: Task, case: str, backend: str, seconds: float, least: float, limit: str, wanted: float
) -> None:
    share = least / seconds
    task.row(
        "Speed",
        case=case,
        attention=backend,
        ms=seconds * 1e3,
        share_of_limit=share,
        limit=limit,
        wanted_share=wanted,
        reached=share >= wanted,
    )


def of_vision(task: Task, setup: Setup, checkpoint: Checkpoint, limits: Limits) -> None:
    """Time encodes from pixels on the host to embeddings on the host."""
    tower = GraphedTower(load(checkpoint, setup.dtype, setup.device))
    size = VisionConfig.of(checkpoint).patch_size
    for (width, height), wanted in task.sizes.pictures.items():
        grid = (1, height // size, width // size)
        patches = torch.randint(0, 256, (math.prod(grid), 3 * size**2), dtype=torch.uint8)
        shape = ItemShape(grid, (height, width))
        assert tower.encode(patches, shape).isfinite().all()
        seconds = median_seconds(
            lambda x=patches, shape=shape: tower.encode(x, shape).cpu(), task.sizes.rounds
        )
        least = vision_operations(checkpoint, len(patches)) / limits.operations_per_second
        speed_row(task, f"vision, {width}x{height}", "", seconds, least, "products", wanted)


def of_language(task: Task, setup: Setup, checkpoint: Checkpoint, limits: Limits) -> None:
    sizes = task.sizes
    runner = setup.runner(checkpoint)
    time_steps(task, setup, checkpoint, limits, runner, "default")
    measure_overhead(task, setup, checkpoint, runner)
    if setup.device.type == "cuda":
        gigabytes = torch.cuda.max_memory_allocated(setup.device) / 1e9
        task.row("Memory", language_and_vision=f"{sizes.checkpoint}", most_GB=gigabytes)


def time_steps(
    task: Task,
    setup: Setup,
    checkpoint: Checkpoint,
    limits: Limits,
    runner: CudaModelRunner,
    backend: str,
) -> None:
    """Time steps that end with the choice of each sequence's best token; the host waits for it."""
    sizes = task.sizes

    def seconds(plan: StepPlan) -> float:
        assert runner.execute(plan, []).isfinite().all()
        return median_seconds(partial(best_tokens, runner, plan), sizes.rounds)

    context = sizes.decode_context
    for batch, wanted in sizes.decodes.items():
        taken = seconds(plan_of([1] * batch, context, setup.block_size))
        least = decode_bytes(checkpoint, batch, context) / limits.bytes_per_second
        case = f"decode, batch {batch}, {context} tokens of context"
        speed_row(task, case, backend, taken, least, "memory", wanted)
    for num_tokens, wanted in sizes.prefills.items():
        taken = seconds(plan_of([num_tokens], num_tokens, setup.block_size))
        least = prefill_operations(checkpoint, num_tokens) / limits.operations_per_second
        case = f"prefill of {num_tokens} tokens"
        speed_row(task, case, backend, taken, least, "products", wanted)


def best_tokens(runner: CudaModelRunner, plan: StepPlan) -> list[int]:
    return runner.execute(plan, []).argmax(-1).tolist()


def measure_overhead(
    task: Task, setup: Setup, checkpoint: Checkpoint, runner: CudaModelRunner
) -> None:
    """Compare whole steps of the engine with their forward passes alone."""
    sizes = task.sizes
    batch = max(sizes.decodes)
    forward = median_seconds(
        partial(best_tokens, runner, plan_of([1] * batch, sizes.decode_context, setup.block_size)),
        sizes.rounds,
    )
    engine = filled_engine(runner, checkpoint, setup, batch, sizes.decode_context)
    steps = []
    for _ in range(OVERHEAD_STEPS):
        began = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - began)
    step = statistics.median(steps)
    share = max(0.0, 1 - forward / step)
    task.row(
        "Scheduling and Python",
        case=f"decode step at batch {batch}",
        step_ms=step * 1e3,
        forward_ms=forward * 1e3,
        share_of_step=share,
        wanted_share=sizes.overhead,
        reached=share <= sizes.overhead,
    )
