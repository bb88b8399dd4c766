"""What a recording holds, without sending anything."""

import time
from typing import Any

from common.recording import Exchange, Recording
from services.commands.output import one_line

COLUMNS = ("number", "arrival", "api", "task", "prompt", "images", "tokens", "ttft", "e2e", "end")


def as_json(recording: Recording) -> dict[str, Any]:
    return summary_of(recording) | {"requests": [describe(one) for one in recording.exchanges]}


def summary_of(recording: Recording) -> dict[str, Any]:
    """Return what the recording is, without its requests."""
    last = recording.exchanges[-1].arrival if recording.exchanges else 0.0
    return {
        "file": str(recording.path),
        "model": recording.runs[-1].model,
        "twinlens": recording.runs[-1].twinlens,
        "runs": len(recording.runs),
        "started": recording.runs[0].time,
        "num_requests": len(recording.exchanges),
        "num_files": recording.num_files,
        "duration_seconds": round(last, 3),
        "is_cut_off": recording.is_cut_off,
    }


def describe(exchange: Exchange) -> dict[str, Any]:
    """Return a request and how it ended, without its texts."""
    asked = exchange.asked
    answered = exchange.answered
    size = len(asked.prompt) // 8 if asked.prompt_kind == "token_ids" else len(asked.prompt)
    described = {
        "number": asked.number,
        "request_id": asked.request_id,
        "arrival_seconds": round(exchange.arrival, 3),
        "api": asked.api,
        "task": asked.task,
        "prompt_kind": asked.prompt_kind,
        "prompt_size": size,
        "num_items": len(asked.items),
        "outcome": answered.outcome if answered else "",
    }
    if answered:
        described |= {
            "error": answered.error,
            "num_tokens": len(answered.token_ids),
            "ttft_seconds": answered.first_token_seconds,
            "e2e_seconds": answered.seconds,
        }
    return described


def as_text(recording: Recording) -> str:
    """Return a summary and a line for each request, in aligned columns."""
    rows = [COLUMNS, *(row_of(exchange) for exchange in recording.exchanges)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([heading(recording), "", *lines])


def heading(recording: Recording) -> str:
    about = summary_of(recording)
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(about["started"]))
    text = (
        f"{about['model']}, Twinlens {about['twinlens']}: {about['num_requests']} requests in "
        f"{about['duration_seconds']:.1f} s from {began}, {about['num_files']} images and videos"
    )
    return one_line(text + (". The last record is incomplete." if recording.is_cut_off else ""))


def row_of(exchange: Exchange) -> tuple[str, ...]:
    asked = exchange.asked
    answered = exchange.answered
    unit = "tokens" if asked.prompt_kind == "token_ids" else "bytes"
    size = len(asked.prompt) // (8 if unit == "tokens" else 1)
    first = answered.first_token_seconds if answered else None
    cells = (
        str(asked.number),
        f"{exchange.arrival:.2f}",
        asked.api,
        asked.task,
        f"{size} {unit}",
        str(len(asked.items)),
        str(len(answered.token_ids)) if answered else "",
        f"{first:.3f}" if first is not None else "",
        f"{answered.seconds:.3f}" if answered else "",
        f"{answered.outcome}: {answered.error}".removesuffix(": ") if answered else "unknown",
    )
    return tuple(map(one_line, cells))
