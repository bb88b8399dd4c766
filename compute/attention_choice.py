"""Chooses among ways to compute attention on a card by measuring each of them there.

The language model and the vision tower choose at start, each at the shapes of its own model.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far results for normally distributed values may differ from those of another way."""
WARM_UPS = 3
ROUNDS = 5
REPEATS = 10
"""The runs between two events. The host launches each while the card computes the one before it, so
that the time of a launch hardly counts."""
AMPERE = (8, 0)
"""The compute capability from which on all kernels run."""
NEVER = 10**18
"""Stands for the nanoseconds of a way that cannot run, where ranks exchange figures."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of trying one way."""

    name: str
    nanoseconds: tuple[int, ...] = ()
    """The time of each case, in the order in which all ways ran them."""
    objection: str = ""
    """Why this way cannot run; "" if it can."""


def objection_to_card(device: torch.device) -> str:
    """Return why kernels for Ampere and newer cards do not run on a device; "" if they do."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= AMPERE:
        return ""
    return f"it runs from compute capability {'.'.join(map(str, AMPERE))} on"


def reason_of(error: Exception) -> str:
    """Return an error as a trial's objection, in one line, with the error that came before it.

    An error ends the capture of a graph, and what ends it may raise another one.
    """
    errors = [error, *filter(None, [error.__context__])]
    return ", after ".join(f"{type(e).__name__}: {e}".splitlines()[0] for e in errors)


def nanoseconds_of(run: Callable[[], object], device: torch.device) -> int:
    """Return the least time of several runs, at least 1. On CUDA the card itself measures it."""
    for _ in range(WARM_UPS):
        run()
    timed = timed_by_card if device.type == "cuda" else timed_by_host
    return max(1, min(timed(run) for _ in range(ROUNDS)))


def timed_by_card(run: Callable[[], object]) -> int:
    """Return the nanoseconds of one of REPEATS runs."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(REPEATS):
        run()
    ended.record()
    ended.synchronize()
    return int(began.elapsed_time(ended) * 1e6 / REPEATS)


def timed_by_host(run: Callable[[], object]) -> int:
    began = time.perf_counter_ns()
    run()
    return time.perf_counter_ns() - began


def agreed(trials: Sequence[Trial], num_cases: int, agree: Callable[[int], int]) -> list[Trial]:
    """Return the trials as all ranks of a group see them.

    The slowest rank decides each figure, because the others wait for it. What one rank cannot run,
    none runs. Every rank must pass the same ways in the same order.

    Parameters
    ----------
    num_cases
        The number of cases, at least 1.
    agree
        Returns the least of the numbers that the ranks pass.
    """
    return [agreed_trial(trial, num_cases, agree) for trial in trials]


def agreed_trial(trial: Trial, num_cases: int, agree: Callable[[int], int]) -> Trial:
    own = [NEVER] * num_cases if trial.objection else trial.nanoseconds
    slowest = tuple(-agree(-count) for count in own)
    if NEVER not in slowest:
        return replace(trial, nanoseconds=slowest)
    return replace(trial, objection=trial.objection or "another rank of the group cannot run it")


def fastest(trials: Sequence[Trial], weights: Sequence[int]) -> Trial | None:
    """Return the trial whose times have the least weighted geometric mean; None if none can run.

    So a case counts by how much faster one way is than another, not by how long it takes, and two
    ways compare the same whichever others there are. Of equals, the first is returned.
    """
    able = [trial for trial in trials if not trial.objection]
    return min(able, key=lambda trial: cost_of(trial, weights), default=None)


def cost_of(trial: Trial, weights: Sequence[int]) -> float:
    """Return the logarithm of the weighted geometric mean of the times."""
    terms = [
        weight * math.log(count) for weight, count in zip(weights, trial.nanoseconds, strict=True)
    ]
    return sum(terms) / sum(weights)


def figures_of(trials: Sequence[Trial], cases: Sequence[str]) -> dict[str, str]:
    """Return what a log line says of each trial, by its name."""
    return {trial.name: figures_of_trial(trial, cases) for trial in trials}


def figures_of_trial(trial: Trial, cases: Sequence[str]) -> str:
    if trial.objection:
        return f"left out: {trial.objection}"
    times = zip(cases, trial.nanoseconds, strict=True)
    return ", ".join(f"{case} {count / 1000:.1f} µs" for case, count in times)
