"""`twinlens serve --read`: what the system reads in an image, and how long each stage took."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.commands.generate import read_image

SAMPLE_PROMPT = (
    "Return the plain text representation of this document as if you were reading it naturally.\n"
)
"""RolmOCR's (https://huggingface.co/reducto/RolmOCR)."""


def show_sample(grpc_target: str, image: Path) -> None:
    text, timings = read_image(grpc_target, image, SAMPLE_PROMPT)
    print(f"\n{image} says:\n\n{text}\n", flush=True)
    for name, seconds in stage_times(timings):
        print(f"  {name:<22} {seconds * 1000:8.1f} ms", flush=True)
    print(flush=True)


def stage_times(timings: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and seconds of each stage, images one by one."""
    yield "preprocess", timings["preprocess_seconds"]
    for i, image in enumerate(timings["images"]):
        yield f"vision queue, image {i}", image["queue_seconds"]
        yield f"vision encode, image {i}", image["encode_seconds"]
    yield "llm queue", timings["queue_seconds"]
    yield "llm prefill", timings["prefill_seconds"]
    yield "llm decode", timings["decode_seconds"]
    yield "first token, in all", timings["time_to_first_token_seconds"]
    yield "in all", timings["total_seconds"]
