"""`twinlens serve` on one card under load: what clients see, and where the time goes."""

import asyncio
from typing import Any

from benchmarks.gpu.part import Task
from benchmarks.serving import Serving
from services.commands.bench.figures import level_figures
from services.commands.bench.load import Level, run_level
from services.commands.bench.targets import HttpTarget
from services.commands.bench.workload import Workload

PROMPT_WORDS = 16
TIMEOUT_SECONDS = 120.0
STAGES = ("preprocess", "vision_queue", "vision_encode", "llm_queue", "prefill", "decode")
WARM_UP_CLIENTS = 3
LEAST_CLIENTS = 4
"""A level has at least as many requests as with that many clients."""


def arguments_of(task: Task, model: str) -> list[str]:
    sizes = task.sizes
    return [
        *("--model", model, "--vision", "1", "--llm", "1", "--no-ui"),
        *("--device", sizes.device, "--dtype", sizes.dtype),
    ]


def measure(task: Task, model: str, table: str, system: str) -> None:
    """Start a system, and write a row for each number of clients."""
    with Serving(*arguments_of(task, model)) as serving:
        url = f"http://127.0.0.1:{serving.http_port}/v1"
        asyncio.run(ask(task, url, table, system))


async def ask(task: Task, url: str, table: str, system: str) -> None:
    """Ask at each level, after a warm-up. Every picture and prompt is a new one."""
    sizes = task.sizes
    width, height = sizes.served_picture
    load = Workload(
        width=width,
        height=height,
        kind="jpeg",
        images_per_request=1,
        same_share=0.0,
        prompt_words=PROMPT_WORDS,
        max_tokens=sizes.served_tokens,
        seed=0,
    )
    asks = load.requests()
    async with HttpTarget(url, "", TIMEOUT_SECONDS) as target:
        await target.check(next(asks))
        for clients in (WARM_UP_CLIENTS, *sizes.clients):
            number = max(clients, LEAST_CLIENTS) * sizes.requests_per_client
            prepared = [target.prepare(next(asks)) for _ in range(number)]
            level = Level(clients, 0.0)
            await run_level(target, prepared, level, lambda answer: None)
            if clients != WARM_UP_CLIENTS:
                write(task, table, system, level_figures(level, 1, {}))


def write(task: Task, table: str, system: str, figures: dict[str, Any]) -> None:
    sizes = task.sizes
    is_one = figures["concurrency"] == 1
    ttft_ms = milliseconds(figures, "ttft_p50")
    task.row(
        table,
        system=system,
        clients=figures["concurrency"],
        requests=figures["succeeded_requests"],
        ttft_ms=ttft_ms,
        ttft_p99_ms=milliseconds(figures, "ttft_p99"),
        wanted_ttft_ms=sizes.wanted_ttft_ms if is_one else None,
        reached=ttft_ms <= sizes.wanted_ttft_ms if is_one and ttft_ms else None,
        tpot_ms=milliseconds(figures, "tpot_p50"),
        tokens_per_second=figures["output_tokens_per_second"],
        images_per_second=figures["images_per_second"],
        client_busy_share=figures["client_busy_share"],
        ok=figures["succeeded_requests"] == figures["requests"],
    )
    stages = {f"{stage}_ms": milliseconds(figures, f"stage_{stage}_mean") for stage in STAGES}
    task.row(
        f"{table}: where the time goes",
        system=system,
        clients=figures["concurrency"],
        **stages,
        whole_ms=milliseconds(figures, "e2e_mean"),
    )


def milliseconds(figures: dict[str, Any], name: str) -> float | None:
    """Return a time, or None if no request succeeded."""
    seconds = figures.get(f"{name}_seconds")
    return None if seconds is None else 1e3 * seconds
