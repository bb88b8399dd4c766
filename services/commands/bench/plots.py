"""Plots of a load test."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from services.commands.bench.figures import path_seconds, present, tokens_of, tpot, ttft
from services.commands.bench.load import Level
from services.commands.chat_client import Answer

MEDIAN_COLOUR = "#1f6f8b"
TAIL_COLOUR = "#d1495b"
REST_COLOUR = "#c9c9c9"
STAGES = {
    "preprocess": ("preprocess", "#66a182"),
    "vision": ("vision: queue and encode", "#edae49"),
    "prefill": ("language: queue and prefill", "#2e4057"),
    "decode": ("language: decode", "#1f6f8b"),
}
"""The label and the colour of each stage of `path_seconds`."""
DPI = 150

Levels = Sequence[Level]
Draw = Callable[[Axes, Levels], None]


def write_plots(folder: Path, levels: Levels, title: str) -> None:
    """Write bench.png, which shows everything, and a file for each of its parts."""
    levels = [level for level in levels if good_answers(level)]
    if not levels:
        return
    draw_overview(levels, title).savefig(folder / "bench.png", dpi=DPI)
    parts: dict[str, tuple[Draw, ...]] = {
        "latency.png": (draw_ttft, draw_tpot),
        "throughput.png": (draw_throughput,),
        "cdf.png": (draw_cdf,),
        "stages.png": (draw_stages,),
    }
    for name, draws in parts.items():
        figure = Figure(figsize=(5 * len(draws), 3.6), layout="constrained")
        for axes, draw in zip(np.ravel(figure.subplots(1, len(draws))), draws, strict=True):
            draw(axes, levels)
        figure.savefig(folder / name, dpi=DPI)


def draw_overview(levels: Levels, title: str) -> Figure:
    figure = Figure(figsize=(13, 7), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    grid = figure.add_gridspec(2, 6)
    draw_ttft(figure.add_subplot(grid[0, 0:2]), levels)
    draw_tpot(figure.add_subplot(grid[0, 2:4]), levels)
    draw_throughput(figure.add_subplot(grid[0, 4:6]), levels)
    draw_cdf(figure.add_subplot(grid[1, 0:3]), levels)
    draw_stages(figure.add_subplot(grid[1, 3:6]), levels)
    return figure


def good_answers(level: Level) -> list[Answer]:
    return [answer for answer in level.answers if not answer.error]


def draw_ttft(axes: Axes, levels: Levels) -> None:
    values = [present(map(ttft, good_answers(level))) for level in levels]
    draw_latency(axes, levels, values, "Time to first token (TTFT)")


def draw_tpot(axes: Axes, levels: Levels) -> None:
    values = [present(map(tpot, good_answers(level))) for level in levels]
    draw_latency(axes, levels, values, "Time per output token (TPOT)")


def draw_latency(axes: Axes, levels: Levels, values: Sequence[list[float]], title: str) -> None:
    """Draw median and 99th percentile in milliseconds at each level."""
    for percentile, colour in ((50, MEDIAN_COLOUR), (99, TAIL_COLOUR)):
        heights = [1e3 * np.percentile(v, percentile) if v else np.nan for v in values]
        axes.plot(range(len(levels)), heights, "o-", color=colour, label=f"p{percentile}")
    axes.set_ylabel("milliseconds")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    finish(axes, levels, title)


def draw_throughput(axes: Axes, levels: Levels) -> None:
    rates = [sum(map(tokens_of, good_answers(level))) / level.seconds for level in levels]
    bars = axes.bar(range(len(levels)), rates, width=0.55, color=MEDIAN_COLOUR)
    axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=9)
    axes.margins(y=0.12)
    axes.set_ylabel("output tokens per second")
    finish(axes, levels, "Throughput")


def draw_cdf(axes: Axes, levels: Levels) -> None:
    """Draw which share of the requests was answered within a time."""
    colours = colormaps["viridis"](np.linspace(0.1, 0.85, len(levels)))
    for level, colour in zip(levels, colours, strict=True):
        seconds = sorted(answer.seconds for answer in good_answers(level))
        shares = np.arange(1, len(seconds) + 1) / len(seconds)
        axes.step([0, *seconds], [0, *shares], where="post", color=colour, label=level.name)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds")
    legend_below(axes, 3)
    decorate(axes, "Share of requests answered within a time")


def draw_stages(axes: Axes, levels: Levels) -> None:
    """Draw the mean time of each stage of a request, stacked to the time that the client saw."""
    paths = [[path_seconds(answer) for answer in good_answers(level)] for level in levels]
    if not all(path for level in paths for path in level):
        axes.text(0.5, 0.5, "this server reports no stage times", ha="center", va="center")
        axes.set_axis_off()
        return
    rows = range(len(levels))
    left = np.zeros(len(levels))
    for stage, (label, colour) in STAGES.items():
        widths = np.array([fmean(path[stage] for path in level) for level in paths])
        axes.barh(rows, widths, 0.6, left, color=colour, label=label)
        left += widths
    whole = [fmean(answer.seconds for answer in good_answers(level)) for level in levels]
    rest = np.maximum(0, whole - left)
    axes.barh(rows, rest, 0.6, left, color=REST_COLOUR, label="between stages")
    axes.set_yticks(rows, [level.name for level in levels])
    axes.invert_yaxis()
    axes.set_xlabel("mean seconds")
    legend_below(axes, 2)
    decorate(axes, "Where a request spends its time", grid="x")


def legend_below(axes: Axes, columns: int) -> None:
    axes.legend(frameon=False, ncols=columns, loc="upper left", bbox_to_anchor=(-0.05, -0.16))


def finish(axes: Axes, levels: Levels, title: str) -> None:
    """Label the levels on the x axis."""
    is_concurrency = bool(levels[0].concurrency)
    labels = [f"{level.concurrency or level.rate:g}" for level in levels]
    axes.set_xticks(range(len(levels)), labels)
    axes.set_xlim(-0.5, len(levels) - 0.5)
    axes.set_xlabel("requests in flight" if is_concurrency else "requests per second")
    decorate(axes, title)


def decorate(axes: Axes, title: str, grid: Literal["x", "y"] = "y") -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
