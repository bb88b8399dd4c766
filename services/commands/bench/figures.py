"""The figures of a load test, computed from its answers. All times are in seconds."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from services.commands.bench.load import REJECTED, Level
from services.commands.chat_client import Answer

PERCENTILES = (50, 90, 95, 99)
Slo = dict[str, float]
"""The most seconds that a good answer takes, by `ttft`, `tpot` and `e2e`."""
REQUEST_STAGES = {
    "preprocess": "preprocess_seconds",
    "llm_queue": "queue_seconds",
    "prefill": "prefill_seconds",
    "decode": "decode_seconds",
}
"""The stages of a request, which follow one another, by the names of Twinlens' timings."""
IMAGE_STAGES = {"vision_queue": "queue_seconds", "vision_encode": "encode_seconds"}
"""The stages of an image. They are part of its request's `llm_queue` or `prefill`."""


def tokens_of(answer: Answer) -> int:
    """Return the number of tokens in the answer, by its usage if the server sent one."""
    counted = answer.usage.get("completion_tokens")
    return counted if isinstance(counted, int) else sum(n for _, n in answer.token_times)


def ttft(answer: Answer) -> float | None:
    """Return the time to the first token."""
    return answer.token_times[0][0] if answer.token_times else None


def tpot(answer: Answer) -> float | None:
    """Return the time per output token after the first, or None for an answer of one token."""
    tokens = tokens_of(answer) - 1
    if tokens < 1 or not answer.token_times:
        return None
    last = max(answer.token_times[-1][0], answer.finish_seconds)
    return (last - answer.token_times[0][0]) / tokens


def itl(answer: Answer) -> list[float]:
    """Return the times between one chunk with tokens and the next."""
    return [later - earlier for (earlier, _), (later, _) in pairwise(answer.token_times)]


def stage_seconds(answer: Answer) -> dict[str, list[float]]:
    """Return the times of each stage as Twinlens reports them; of other servers, nothing."""
    timings = answer.timings
    found = {
        stage: [float(timings[name])] for stage, name in REQUEST_STAGES.items() if name in timings
    }
    for stage, name in IMAGE_STAGES.items():
        if images := timings.get("images"):
            found[stage] = [float(image[name]) for image in images]
    return found


def path_seconds(answer: Answer) -> dict[str, float]:
    """Return how long a request waited for each stage in turn; nothing if they are not known.

    The language group starts while images are encoded, so the time of `vision` is that of the
    image that was ready last, and is taken out of the language group's.
    """
    times = stage_seconds(answer)
    if not REQUEST_STAGES.keys() <= times.keys():
        return {}
    images = zip(times.get("vision_queue", []), times.get("vision_encode", []), strict=True)
    language = times["llm_queue"][0] + times["prefill"][0]
    vision = min(language, max((waited + encoded for waited, encoded in images), default=0.0))
    return {
        "preprocess": times["preprocess"][0],
        "vision": vision,
        "prefill": language - vision,
        "decode": times["decode"][0],
    }


def failure_of(answer: Answer) -> str:
    """Return the kind of a failure, or nothing if the answer succeeded."""
    if not answer.error:
        return ""
    if answer.is_broken:
        return "connection"
    if answer.has_timed_out:
        return "timeout"
    if answer.status == 200:
        return "error in the stream"
    return f"status {answer.status}"


def is_good(answer: Answer, slo: Slo) -> bool:
    """Whether the answer succeeded within all limits. A figure that it does not have is within."""
    found = {"ttft": ttft(answer), "tpot": tpot(answer), "e2e": answer.seconds}
    return not answer.error and all((found[name] or 0.0) <= most for name, most in slo.items())


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return mean and percentiles under keys such as `ttft_p50_seconds`; nothing of no values."""
    if not values:
        return {}
    found = {f"{name}_mean_seconds": statistics.fmean(values)}
    for percentile, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True):
        found[f"{name}_p{percentile}_seconds"] = float(value)
    return found


def level_figures(level: Level, images_per_request: int, slo: Slo) -> dict[str, Any]:
    """Return the figures of one level, by flat keys that say their unit."""
    good = [answer for answer in level.answers if not answer.error]
    load = {"rate": level.rate} if level.rate else {"concurrency": level.concurrency}
    found: dict[str, Any] = load | counts(level.answers) | rates(good, level, images_per_request)
    found |= spread("ttft", present(map(ttft, good)))
    found |= spread("tpot", present(map(tpot, good)))
    found |= spread("itl", [gap for answer in good for gap in itl(answer)])
    found |= spread("e2e", [answer.seconds for answer in good])
    for stage, values in stages_of(good).items():
        found |= spread(f"stage_{stage}", values)
    if slo:
        within = sum(is_good(answer, slo) for answer in level.answers)
        found["goodput_share"] = within / max(1, len(level.answers))
        found["goodput_requests_per_second"] = per_second(within, level)
    return found


def counts(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return how many requests ended in which way. Refusals with 429 are not failures."""
    failures = Counter(failure_of(a) for a in answers if a.error and a.status != REJECTED)
    return {
        "requests": len(answers),
        "succeeded_requests": sum(not answer.error for answer in answers),
        "rejected_requests": sum(answer.status == REJECTED for answer in answers),
        "failed_requests": failures.total(),
        "failures": dict(failures),
    }


def rates(good: Sequence[Answer], level: Level, images_per_request: int) -> dict[str, float]:
    output = sum(map(tokens_of, good))
    found = {
        "duration_seconds": level.seconds,
        "requests_per_second": per_second(len(good), level),
        "images_per_second": per_second(images_per_request * len(good), level),
        "output_tokens_per_second": per_second(output, level),
        "output_tokens_mean": output / max(1, len(good)),
        "client_busy_share": level.client_cpu_seconds / max(level.seconds, 1e-9),
    }
    prompts = present(answer.usage.get("prompt_tokens") for answer in good)
    if prompts:
        found["prompt_tokens_per_second"] = per_second(sum(prompts), level)
        found["prompt_tokens_mean"] = statistics.fmean(prompts)
    return found | spread("send_lag", level.lags)


def per_second(number: float, level: Level) -> float:
    return number / level.seconds if level.seconds else 0.0


def stages_of(good: Iterable[Answer]) -> dict[str, list[float]]:
    """Return all times of each stage."""
    found: dict[str, list[float]] = {}
    for answer in good:
        for stage, values in stage_seconds(answer).items():
            found.setdefault(stage, []).extend(values)
    return found


def present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
