"""The stages of a running system are measured over gRPC."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from PIL import Image

from common.config import BadSetting
from common.membership import READY, STARTING
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.commands.client import ClientError
from services.commands.stage_times import (
    NUM_IMAGES,
    NUM_ROUNDS,
    collapse_placeholders,
    make_variants,
    measure,
)

PLACEHOLDER = 7
PROMPT_IDS = [1, PLACEHOLDER, PLACEHOLDER, PLACEHOLDER, 2, 2]
CONCURRENCY = 3


class System(inference_pb2_grpc.InferenceServiceServicer, control_pb2_grpc.ControlServiceServicer):
    """Answers at once, records the requests, and has cached an image from its second time on."""

    def __init__(self, remembers: bool = True, groups: int = 2) -> None:
        self.remembers = remembers
        self.groups = groups
        self.asked: list[inference_pb2.GenerateRequest] = []

    def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> inference_pb2.GenerateResponse:
        known = self.remembers and request.images[0].data in {
            earlier.images[0].data for earlier in self.asked
        }
        self.asked.append(request)
        response = inference_pb2.GenerateResponse(prompt_token_ids=PROMPT_IDS)
        response.timings.preprocess_seconds = 0.125
        response.timings.images.add(encode_seconds=len(self.asked), cached=known)
        return response

    def ListMembers(
        self, request: control_pb2.ListMembersRequest, context: grpc.ServicerContext
    ) -> control_pb2.ListMembersResponse:
        ranks = [
            control_pb2.Member(role="llm", rank=rank, state=READY)
            for _ in range(self.groups)
            for rank in (0, 1)
        ]
        others = [
            control_pb2.Member(role="llm", state=STARTING),
            control_pb2.Member(role="vision", state=READY),
        ]
        return control_pb2.ListMembersResponse(members=ranks + others)


@contextmanager
def serving(system: System) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(CONCURRENCY))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(system, server)
    control_pb2_grpc.add_ControlServiceServicer_to_server(system, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(path)
    return path


def test_towers_are_measured_on_new_images_and_groups_on_a_cached_one(
    picture: Path,
) -> None:
    system = System()
    with serving(system) as target:
        times = measure(target, picture, 9, CONCURRENCY, PLACEHOLDER)
    towers = system.asked[:NUM_IMAGES]
    groups = system.asked[NUM_IMAGES:]
    assert len({request.images[0].data for request in towers}) == NUM_IMAGES
    assert {request.images[0].data for request in groups} == {towers[-1].images[0].data}
    assert (times.preprocess_seconds, times.vision_seconds) == (0.125, (NUM_IMAGES + 1) / 2)
    assert times.group_rate > 0


def test_groups_compute_every_token(picture: Path) -> None:
    system = System()
    with serving(system) as target:
        measure(target, picture, 9, CONCURRENCY, PLACEHOLDER)
    groups = system.asked[NUM_IMAGES:]
    assert len(groups) == NUM_ROUNDS * CONCURRENCY
    assert len({tuple(request.token_ids.ids[:6]) for request in groups}) == len(groups), (
        "no two prompts begin alike"
    )
    assert {tuple(request.token_ids.ids[6:]) for request in groups} == {(1, PLACEHOLDER, 2, 2)}
    assert {(request.stopping.max_tokens, request.stopping.ignore_eos) for request in groups} == {
        (9, True)
    }


def test_two_groups_share_the_rate(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.commands.stage_times.measure_rate", lambda *_: 8.0)
    with serving(System(groups=2)) as target:
        assert measure(target, picture, 9, CONCURRENCY, PLACEHOLDER).group_rate == 4.0


def test_a_rate_that_vision_limits_is_not_reported(picture: Path) -> None:
    with (
        serving(System(remembers=False)) as target,
        pytest.raises(ClientError, match="embedding-cache-mib"),
    ):
        measure(target, picture, 9, CONCURRENCY, PLACEHOLDER)


def test_a_system_without_a_ready_group_is_not_measured(picture: Path) -> None:
    with (
        serving(System(groups=0)) as target,
        pytest.raises(ClientError, match="no ready language group"),
    ):
        measure(target, picture, 9, CONCURRENCY, PLACEHOLDER)


def test_variants_have_the_size_of_the_picture(picture: Path) -> None:
    for file in make_variants(picture):
        with Image.open(io.BytesIO(file)) as variant:
            assert variant.size == (8, 8)


def test_a_file_that_is_not_an_image_is_refused() -> None:
    with pytest.raises(BadSetting, match="not a readable image"):
        make_variants(Path(__file__))


def test_each_image_keeps_one_placeholder() -> None:
    assert collapse_placeholders([1, 7, 7, 2, 2, 7, 7, 7], 7) == [1, 7, 2, 2, 7]
    assert collapse_placeholders([1, 7, 7], None) == [1, 7, 7]
