"""How long the stages of a running system take, asked over gRPC."""

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
from services.commands.generate import ClientError, connected

NUM_IMAGES = 5
NUM_ROUNDS = 4
PROMPT = "What does it say?"
ANSWER_SECONDS = 600.0
LIST_SECONDS = 10.0
NUM_BYTE_TOKENS = 200
NUM_OWN_TOKENS = 6
"""Any vocabulary has at least so many tokens; so many at a prompt's beginning make it like no
other."""

Ask = Callable[[inference_pb2.GenerateRequest], inference_pb2.GenerateResponse]


@dataclass(frozen=True)
class StageTimes:
    """Medians of a request in preprocess and of an image in a vision replica; and how many requests
    a second one group answers."""

    preprocess_seconds: float
    vision_seconds: float
    group_rate: float


def measure(
    target: str, image: Path, max_tokens: int, concurrency: int, image_token_id: int | None
) -> StageTimes:
    """Raises ClientError where the system does not answer, BadSetting where the file is no
    image."""
    with connected(target) as channel:
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
            raise ClientError(f"{target} has no language group that is ready")
        pictures = variants(image)
        answers = [ask(request_about(picture)) for picture in pictures]
        prompt = collapsed(answers[-1].prompt_token_ids, image_token_id)
        rate = rate_of_groups(ask, prompt, pictures[-1], max_tokens, concurrency)
    vision_seconds = statistics.median(
        answer.timings.images[0].encode_seconds for answer in answers
    )
    preprocess_seconds = statistics.median(answer.timings.preprocess_seconds for answer in answers)
    return StageTimes(preprocess_seconds, vision_seconds, rate / num_groups)


def rate_of_groups(
    ask: Ask, prompt: list[int], picture: bytes, max_tokens: int, concurrency: int
) -> float:
    """Answers a second of all language groups together, asked about one image that a vision replica
    knows, by prompts that no prefix cache knows: no request waits for a tower, and every token
    is computed."""

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
            f"only {num_cached} of {count} requests found their image in a cache, so vision set "
            "the pace: give the vision replicas an "
            "--embedding-cache-mib that holds an image"
        )
    return count / seconds


def request_about(picture: bytes) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(text=PROMPT, images=[inference_pb2.Image(data=picture)])
    request.stopping.max_tokens = 1
    request.response.return_prompt_token_ids = True
    return request


def variants(image: Path) -> list[bytes]:
    """The picture, each time with another pixel, so that no cache knows it; as PNG files."""
    try:
        with Image.open(image) as opened:
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as e:
        raise BadSetting(f"--image {image}: no image that can be read ({e})") from e
    files = []
    for _ in range(NUM_IMAGES):
        picture.putpixel((0, 0), tuple(random.randbytes(3)))
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=1)
        files.append(file.getvalue())
    return files


def collapsed(token_ids: Iterable[int], image_token_id: int | None) -> list[int]:
    """One placeholder an image, as a request brings them."""
    runs = [(token, len(list(run))) for token, run in itertools.groupby(token_ids)]
    return [
        token for token, length in runs for _ in range(1 if token == image_token_id else length)
    ]
