"""Measures the stages of a running system over gRPC."""

import io
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from common.config import BadSetting
from common.membership import READY
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.commands.client import ClientError, connect

NUM_IMAGES = 5
NUM_ROUNDS = 4
PROMPT = "What does it say?"
ANSWER_SECONDS = 600.0
LIST_SECONDS = 10.0
NUM_BYTE_TOKENS = 200
"""Every vocabulary has at least this many tokens."""
NUM_OWN_TOKENS = 6
"""This many random tokens make the beginning of a prompt unique."""

Ask = Callable[[inference_pb2.GenerateRequest], inference_pb2.GenerateResponse]


@dataclass(frozen=True)
class StageTimes:
    """The pace of each stage.

    The seconds are medians: of a request in preprocess, and of an image in a vision replica.
    `group_rate` is the number of requests that one language group answers in a second.
    """

    preprocess_seconds: float
    vision_seconds: float
    group_rate: float


def measure(
    target: str, image: Path, max_tokens: int, concurrency: int, image_token_id: int | None
) -> StageTimes:
    """Measure the system at `target` with variants of an image; nothing else should use it.

    Raises
    ------
    ClientError
        If the system does not answer, or does not cache embeddings.
    BadSetting
        If the file is not an image.
    """
    with connect(target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        ask: Ask = lambda request: stub.Generate(request, timeout=ANSWER_SECONDS)  # noqa: E731
        listed = control_pb2_grpc.ControlServiceStub(channel).ListMembers(
            control_pb2.ListMembersRequest(), timeout=LIST_SECONDS
        )
        num_groups = sum(
            member.role == "llm" and member.rank == 0 and member.state == READY
            for member in listed.members
        )
        if not num_groups:
            raise ClientError(f"{target} has no ready language group")
        pictures = make_variants(image)
        answers = [ask(request_about(picture)) for picture in pictures]
        prompt = collapse_placeholders(answers[-1].prompt_token_ids, image_token_id)
        rate = measure_rate(ask, prompt, pictures[-1], max_tokens, concurrency)
    vision_seconds = statistics.median(
        answer.timings.images[0].encode_seconds for answer in answers
    )
    preprocess_seconds = statistics.median(answer.timings.preprocess_seconds for answer in answers)
    return StageTimes(preprocess_seconds, vision_seconds, rate / num_groups)


def measure_rate(
    ask: Ask, prompt: list[int], picture: bytes, max_tokens: int, concurrency: int
) -> float:
    """Return the answers per second of all language groups together.

    Vision replicas have cached `picture`, so no request waits for a tower. Each prompt begins with
    random tokens, so no prefix cache has it and the groups compute every token.
    """

    def once(_: int) -> bool:
        own = random.choices(range(NUM_BYTE_TOKENS), k=NUM_OWN_TOKENS)
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=own + prompt),
            images=[inference_pb2.Image(data=picture)],
        )
        request.stopping.max_tokens = max_tokens
        request.stopping.ignore_eos = True
        return ask(request).timings.images[0].cached

    count = NUM_ROUNDS * concurrency
    with ThreadPoolExecutor(concurrency) as pool:
        began = time.monotonic()
        num_cached = sum(pool.map(once, range(count)))
        seconds = time.monotonic() - began
    if num_cached < count / 2:
        raise ClientError(
            f"only {num_cached} of {count} requests found their image cached, so vision limited "
            "the rate: start the vision replicas with an --embedding-cache-mib that holds an image"
        )
    return count / seconds


def request_about(picture: bytes) -> inference_pb2.GenerateRequest:
    """Return a request that generates one token and reports its prompt's token ids."""
    request = inference_pb2.GenerateRequest(text=PROMPT, images=[inference_pb2.Image(data=picture)])
    request.stopping.max_tokens = 1
    request.response.return_prompt_token_ids = True
    return request


def make_variants(image: Path) -> list[bytes]:
    """Return PNG files of the image that differ in one pixel, so that no cache has them.

    Raises
    ------
    BadSetting
        If the file is not an image.
    """
    try:
        with Image.open(image) as opened:
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as e:
        raise BadSetting(f"--image {image}: not a readable image ({e})") from e
    files = []
    for _ in range(NUM_IMAGES):
        picture.putpixel((0, 0), tuple(random.randbytes(3)))
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=1)
        files.append(file.getvalue())
    return files


def collapse_placeholders(token_ids: Iterable[int], image_token_id: int | None) -> list[int]:
    """Return the ids with one placeholder for each image, which is what a request contains."""
    runs = [(token, len(list(run))) for token, run in itertools.groupby(token_ids)]
    return [
        token for token, length in runs for _ in range(1 if token == image_token_id else length)
    ]
