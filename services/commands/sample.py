"""`twinlens serve --read`: what the system reads in an image, and how long each stage took."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.commands.client import as_dict, connect, read_file
from services.commands.output import answer_text

SAMPLE_PROMPT = (
    "Return the plain text representation of this document as if you were reading it naturally.\n"
)
"""RolmOCR's own prompt (https://huggingface.co/reducto/RolmOCR)."""


def show_sample(target: str, image: Path) -> None:
    """Print the text of an image and the duration of each stage."""
    text, timings = read_image(target, image, SAMPLE_PROMPT)
    print(f"\n{image} says:\n\n{answer_text(text)}\n", flush=True)
    for name, seconds in stage_durations(timings):
        print(f"  {name:<22} {seconds * 1000:8.1f} ms", flush=True)
    print(flush=True)


def read_image(target: str, path: Path, prompt: str) -> tuple[str, dict[str, Any]]:
    """Return the text that the system at `target` reads in an image, and its timings by name.

    Raises
    ------
    ClientError
        If the file cannot be read or the request fails.
    """
    request = inference_pb2.GenerateRequest(
        text=prompt,
        images=[inference_pb2.Image(data=read_file(path))],
        sampling=inference_pb2.SamplingParams(temperature=0),
    )
    with connect(target) as channel:
        response = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)
    return response.text, as_dict(response.timings)


def stage_durations(timings: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the name and the seconds of each stage, with each image's own."""
    yield "preprocess", timings["preprocess_seconds"]
    for i, image in enumerate(timings["images"]):
        yield f"vision queue, image {i}", image["queue_seconds"]
        yield f"vision encode, image {i}", image["encode_seconds"]
    yield "llm queue", timings["queue_seconds"]
    yield "llm prefill", timings["prefill_seconds"]
    yield "llm decode", timings["decode_seconds"]
    yield "time to first token", timings["time_to_first_token_seconds"]
    yield "total", timings["total_seconds"]
