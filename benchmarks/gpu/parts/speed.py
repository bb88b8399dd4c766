"""Decode, prefill and vision of the 7B shape, next to what the card can do."""

import gc
import math
import statistics
import time
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.counts import decode_bytes, plan_of, prefill_operations, vision_operations
from benchmarks.gpu.engine import filled_engine
from benchmarks.gpu.limits import Limits, measure_limits, median_seconds
from benchmarks.gpu.part import Task
from benchmarks.gpu.setup import Setup
from common.checkpoint import Checkpoint
from compute.attention_choice import Trial
from services.llm.attention_backends import BACKENDS
from services.llm.attention_backends.protocol import PagedBackend
from services.llm.attention_backends.trials import CASES, Room, try_backend
from services.llm.cuda_model_runner import CudaModelRunner
from services.llm.step_plan import StepPlan
from services.vision import attention_choice as vision_choice
from services.vision.families import load
from services.vision.families.qwen2_5_vl import Qwen25VisionTower, VisionConfig
from services.vision.graphed_tower import GraphedTower
from services.vision.tower_thread import ItemShape

QUANTIZED = {"fp8": "FP8", "awq": "int4"}
"""The weights of the checkpoints in these formats."""


def run(task: Task) -> None:
    with Setup(task) as setup:
        limits = measure(task, setup)
        checkpoint = setup.checkpoint()
        with task.attempt("Speed", case="vision"):
            of_vision(task, setup, checkpoint, limits)
        of_language(task, setup, checkpoint, limits)
        of_quantized(task, setup, limits)


def measure(task: Task, setup: Setup) -> Limits:
    sizes = task.sizes
    limits = measure_limits(setup.device, sizes.buffer_bytes, sizes.matrix_size, sizes.rounds)
    task.row(
        "Limits",
        memory_GB_per_second=limits.bytes_per_second / 1e9,
        products_TFLOPS=limits.operations_per_second / 1e12,
    )
    free_memory(setup)
    return limits


def free_memory(setup: Setup) -> None:
    """Give the memory of what was dropped back to the card."""
    gc.collect()
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()


def speed_row(
    task: Task,
    case: str,
    seconds: float,
    least: float,
    limit: str,
    wanted: float | None,
    weights: str = "bfloat16",
    attention: str = "",
) -> None:
    share = least / seconds
    task.row(
        "Speed",
        case=case,
        weights=weights,
        attention=attention,
        ms=seconds * 1e3,
        share_of_limit=share,
        limit=limit,
        wanted_share=wanted,
        reached=None if wanted is None else share >= wanted,
    )


def of_vision(task: Task, setup: Setup, checkpoint: Checkpoint, limits: Limits) -> None:
    """Time encodes from pixels on the host to embeddings on the host."""
    tower = load(checkpoint, setup.dtype, setup.device)
    if not task.dry_run:  # images of the real sizes take too long on the CPU
        assert isinstance(tower, Qwen25VisionTower)
        shapes = tower.attention_shapes()
        for kind in shapes.groups:
            for name in vision_choice.WAYS:
                trial = vision_choice.try_way(name, kind, shapes, tower)
                trial_row(task, f"vision, {kind}", trial, vision_choice.CASES)
        vision_choice.choose_attention(tower)
    graphed = GraphedTower(tower)
    size = VisionConfig.of(checkpoint).patch_size
    for (width, height), wanted in task.sizes.pictures.items():
        grid = (1, height // size, width // size)
        patches = torch.randint(0, 256, (math.prod(grid), 3 * size**2), dtype=torch.uint8)
        shape = ItemShape(grid, (height, width))
        assert graphed.encode(patches, shape).isfinite().all()
        seconds = median_seconds(partial(encoded, graphed, patches, shape), task.sizes.rounds)
        least = vision_operations(checkpoint, len(patches)) / limits.operations_per_second
        speed_row(task, f"vision, {width}x{height}", seconds, least, "products", wanted)


def encoded(tower: GraphedTower[Any], patches: torch.Tensor, shape: ItemShape) -> torch.Tensor:
    return tower.encode(patches, shape).cpu()


def trial_row(task: Task, where: str, trial: Trial, cases: tuple[str, ...]) -> None:
    """Write what one way to compute attention takes alone."""
    times = zip(cases, trial.nanoseconds, strict=True) if trial.nanoseconds else ()
    task.row(
        f"Attention alone: {where.partition(',')[0]}",
        where=where,
        attention=trial.name,
        **{f"{case}_µs": nanoseconds / 1e3 for case, nanoseconds in times},
        left_out=trial.objection,
    )


def of_language(task: Task, setup: Setup, checkpoint: Checkpoint, limits: Limits) -> None:
    room = Room(max(task.sizes.decodes), checkpoint.max_model_len)
    if not task.dry_run:
        for kind in BACKENDS.values():
            with task.attempt("Attention alone: language", attention=kind.name):
                shapes = setup.shapes(checkpoint, kind)
                trial_row(task, "language", try_backend(kind, shapes, room, setup.device), CASES)
            free_memory(setup)
    for kind in setup.backends(checkpoint):
        with task.attempt("Speed", case="language", attention=kind.name):
            measure_language(task, setup, checkpoint, limits, kind)
        free_memory(setup)
    if setup.device.type == "cuda":
        gigabytes = torch.cuda.max_memory_allocated(setup.device) / 1e9
        task.row("Memory", models="language and vision in bfloat16", most_GB=gigabytes)


def measure_language(
    task: Task,
    setup: Setup,
    checkpoint: Checkpoint,
    limits: Limits,
    kind: type[PagedBackend],
) -> None:
    """Time all steps with one backend. Its runner, and so its KV cache, ends with the call."""
    runner = setup.runner(checkpoint, kind)
    time_decodes(task, checkpoint, limits, runner, kind)
    time_prefills(task, checkpoint, limits, runner, kind)
    measure_overhead(task, setup, checkpoint, runner, kind)


def of_quantized(task: Task, setup: Setup, limits: Limits) -> None:
    """Time decodes of quantized weights, with the fastest attention."""
    runner: CudaModelRunner | None = None
    for format, weights in QUANTIZED.items():
        with task.attempt("Speed", case="decode", weights=weights):
            checkpoint = setup.checkpoint(format)
            kind = setup.backends(checkpoint)[0]
            runner = setup.runner(checkpoint, kind)
            time_decodes(task, checkpoint, limits, runner, kind, weights)
        runner = None
        free_memory(setup)


def time_decodes(
    task: Task,
    checkpoint: Checkpoint,
    limits: Limits,
    runner: CudaModelRunner,
    kind: type[PagedBackend],
    weights: str = "bfloat16",
) -> None:
    context = task.sizes.decode_context
    for batch, wanted in task.sizes.decodes.items():
        taken = step_seconds(task, runner, plan_of([1] * batch, context, kind.block_size))
        least = decode_bytes(checkpoint, batch, context) / limits.bytes_per_second
        case = f"decode, batch {batch}, {context} tokens of context"
        wanted_here = wanted if weights == "bfloat16" else None
        speed_row(task, case, taken, least, "memory", wanted_here, weights, kind.name)


def time_prefills(
    task: Task,
    checkpoint: Checkpoint,
    limits: Limits,
    runner: CudaModelRunner,
    kind: type[PagedBackend],
) -> None:
    for num_tokens, wanted in task.sizes.prefills.items():
        taken = step_seconds(task, runner, plan_of([num_tokens], num_tokens, kind.block_size))
        least = prefill_operations(checkpoint, num_tokens) / limits.operations_per_second
        case = f"prefill of {num_tokens} tokens"
        speed_row(task, case, taken, least, "products", wanted, attention=kind.name)


def step_seconds(task: Task, runner: CudaModelRunner, plan: StepPlan) -> float:
    """Return the time of a step that ends with the best tokens; the host waits for them."""
    assert runner.execute(plan, []).isfinite().all()
    return median_seconds(partial(best_tokens, runner, plan), task.sizes.rounds)


def best_tokens(runner: CudaModelRunner, plan: StepPlan) -> list[int]:
    return runner.execute(plan, []).argmax(-1).tolist()


def measure_overhead(
    task: Task,
    setup: Setup,
    checkpoint: Checkpoint,
    runner: CudaModelRunner,
    kind: type[PagedBackend],
) -> None:
    """Compare whole steps of the engine with their forward passes alone."""
    sizes = task.sizes
    batch = max(sizes.decodes)
    plan = plan_of([1] * batch, sizes.decode_context, kind.block_size)
    forward = step_seconds(task, runner, plan)
    num_blocks = setup.num_blocks(kind.block_size)
    engine = filled_engine(
        runner, checkpoint, num_blocks, kind.block_size, batch, sizes.decode_context
    )
    steps = []
    for _ in range(sizes.rounds):
        began = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - began)
    step = statistics.median(steps)
    share = max(0.0, 1 - forward / step)
    task.row(
        "Scheduling and Python",
        case=f"decode step at batch {batch}",
        attention=kind.name,
        step_ms=step * 1e3,
        forward_ms=forward * 1e3,
        share_of_step=share,
        wanted_share=sizes.overhead,
        reached=share <= sizes.overhead,
    )
