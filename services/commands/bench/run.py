"""Runs a load test: warm-up, levels, and the results."""

import argparse
import asyncio
import importlib.util
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from services.commands.bench.command import DEFAULT_REQUESTS, REQUESTS_PER_CLIENT
from services.commands.bench.figures import level_figures
from services.commands.bench.load import Level, run_level
from services.commands.bench.report import level_text, note, progress, write_results
from services.commands.bench.targets import GrpcTarget, HttpTarget, Target
from services.commands.bench.workload import Ask, Workload
from services.commands.client import (
    NEEDS_TOOLS,
    ClientError,
    cannot_write,
    prepare_folder,
    run_command,
)
from services.commands.output import json_line

RATE_WARMUP = 4
"""The concurrency of the warm-up for a rate."""


@dataclass
class Run:
    """A load test, with what is known of it so far."""

    arguments: argparse.Namespace
    workload: Workload
    target: Target
    levels: list[Level] = field(default_factory=list)
    is_interrupted: bool = False

    def planned_levels(self) -> list[Level]:
        if rate := self.arguments.rate:
            return [Level(0, rate, self.workload.seed)]
        return [Level(concurrency, 0.0) for concurrency in self.arguments.concurrency]

    def figures(self, level: Level) -> dict[str, Any]:
        return level_figures(level, self.workload.images_per_request, self.arguments.slo)

    def results(self) -> dict[str, Any]:
        """Return all figures as one JSON object. Its own are those of the last level."""
        levels = [rounded(self.figures(level)) for level in self.levels if level.answers]
        about = {
            "target": self.target.address,
            "model": self.target.model,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "is_interrupted": self.is_interrupted,
            "has_fixed_length": self.target.fixes_length,
            "workload": asdict(self.workload),
            "slo_seconds": self.arguments.slo,
        }
        return about | levels[-1] | {"levels": levels}


def run_bench(arguments: argparse.Namespace) -> int:
    """Run a load test and print its results. Return the exit status.

    Ctrl-C ends it early, with the results of what was measured until then.
    """
    run = make_run(arguments)
    return run_command(lambda _: measure_and_publish(run), arguments)


def make_run(arguments: argparse.Namespace) -> Run:
    width, height = arguments.image
    workload = Workload(
        width=width,
        height=height,
        kind=arguments.image_format,
        images_per_request=arguments.images,
        same_share=arguments.same,
        prompt_words=arguments.prompt_words,
        max_tokens=arguments.max_tokens,
        seed=random.randrange(2**32) if arguments.seed is None else arguments.seed,
    )
    kind, where = (GrpcTarget, arguments.grpc) if arguments.grpc else (HttpTarget, arguments.url)
    return Run(arguments, workload, kind(where, arguments.model, arguments.timeout))


def check_plots() -> None:
    """Raise ClientError if nothing can draw the plots of --out."""
    if not importlib.util.find_spec("matplotlib"):
        raise ClientError(f"--out {NEEDS_TOOLS}")


def measure_and_publish(run: Run) -> None:
    """Measure, print the results, and write the files.

    Raises
    ------
    ClientError
        If the server cannot be asked, if no request of the last level succeeded, or, after the
        results, if the files cannot be written.
    KeyboardInterrupt
        After the results, if the test was interrupted.
    """
    if run.arguments.out:
        check_plots()
        prepare_folder(run.arguments.out)
    try:
        asyncio.run(measure(run))
    except KeyboardInterrupt:
        run.is_interrupted = True
        if any(level.answers for level in run.levels):
            publish(run)
        raise
    publish(run)
    answers = run.levels[-1].answers
    if all(answer.error for answer in answers):
        [(error, _)] = Counter(answer.error for answer in answers).most_common(1)
        raise ClientError(f"all {len(answers)} requests failed: {error}")


async def measure(run: Run) -> None:
    """Measure all levels, and print each. Stop after a level of which no request succeeded."""
    requests = run.workload.requests()
    async with run.target as target:
        await target.check(next(requests))
        if not target.fixes_length:
            note("the server refuses ignore_eos and min_tokens, so answers may differ in length")
        for level in run.planned_levels():
            await measure_level(run, level, requests)
            if all(answer.error for answer in level.answers):
                return


async def measure_level(run: Run, level: Level, requests: Iterator[Ask]) -> None:
    """Warm up, then measure one level."""
    clients = level.concurrency or RATE_WARMUP
    warmup = clients if run.arguments.warmup is None else run.arguments.warmup
    count = run.arguments.requests or max(DEFAULT_REQUESTS, REQUESTS_PER_CLIENT * clients)
    prepared = await prepare(run.target, islice(requests, warmup + count), warmup + count)
    with progress(f"{level.name}: warm-up", warmup) as report:
        await run_level(run.target, prepared[:warmup], Level(clients, 0.0), report)
    run.levels.append(level)
    try:
        with progress(level.name, count) as report:
            await run_level(run.target, prepared[warmup:], level, report)
    finally:  # an interrupted level has figures, too
        if level.answers:
            print(level_text(level, run.figures(level)), end="\n\n", flush=True)


async def prepare(target: Target, asks: Iterable[Ask], count: int) -> list[Any]:
    """Return the requests as they are sent. Many large images take a while to draw."""
    prepared = []
    with progress("drawing images", count) as report:
        for ask in asks:
            prepared.append(target.prepare(ask))
            report(None)
            await asyncio.sleep(0)  # Ctrl-C ends this loop, too
    return prepared


def publish(run: Run) -> None:
    """Print the results as the last line, then write the files, which may fail."""
    results = run.results()
    print(json_line(results), flush=True)
    if folder := run.arguments.out:
        from services.commands.bench.plots import write_plots  # needs matplotlib

        try:
            write_results(folder, results, run.levels)
            write_plots(folder, run.levels, title_of(run))
        except OSError as error:
            raise cannot_write(folder, error) from error


def title_of(run: Run) -> str:
    """Return what the plots show."""
    load = run.workload
    number = load.images_per_request
    images = f"{number} image{'s' * (number != 1)} of {load.width}x{load.height}"
    answer = f"answers of {load.max_tokens} tokens"
    return f"{run.target.model or run.target.address}: requests with {images}, {answer}"


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures with six significant digits."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in figures.items()}
