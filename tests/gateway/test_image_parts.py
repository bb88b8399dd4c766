"""The bounds of pixels that a request sets, wherever they stand in it, and over both APIs."""

import base64
import json
from typing import Any

import pytest

from common.errors import InvalidRequest
from common.pixel_bounds import MAX_BOUND, NO_BOUNDS, PixelBounds
from proto.twinlens.inference.v1 import inference_pb2
from services.gateway.generation import GenerationRequest
from services.gateway.grpc_wire import split_media
from services.gateway.recorder import recorded_item
from services.gateway.schema import chat_to_generation, parse_chat
from services.gateway.videos import Video, bounds_of, bytes_of, item_of

URL = "data:image/png;base64," + base64.b64encode(b"picture").decode()
FILE = {"type": "video_url", "video_url": {"url": URL}}


def generation(part: Any, inside: Any, **body: Any) -> GenerationRequest:
    image = {"type": "image_url", "image_url": {"url": URL, **(inside or {})}, **(part or {})}
    messages = [{"role": "user", "content": [image, FILE]}]
    text = json.dumps({"messages": messages, **body})
    return chat_to_generation(parse_chat(text.encode()), "id", None, 4096)


def image_bounds(
    part: Any = None, inside: Any = None, **body: Any
) -> tuple[int | None, int | None]:
    image, _ = generation(part, inside, **body).images
    assert bytes_of(image) == b"picture"
    return bounds_of(image).min_pixels, bounds_of(image).max_pixels


def refusal(part: Any = None, inside: Any = None, **body: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        generation(part, inside, **body)
    return caught.value.message


LOW = 512 * 512


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, (None, None)),
        ({"part": {"max_pixels": 9}}, (None, 9)),
        ({"inside": {"min_pixels": 4, "max_pixels": 9}}, (4, 9)),
        ({"part": {"max_pixels": 9}, "inside": {"max_pixels": 8, "min_pixels": None}}, (None, 8)),
        ({"mm_processor_kwargs": {"min_pixels": 4}}, (4, None)),
        ({"mm_processor_kwargs": {"images_kwargs": {"max_pixels": 9}}}, (None, 9)),
        (
            {"mm_processor_kwargs": {"size": {"shortest_edge": 4, "longest_edge": 9}}},
            (4, 9),
        ),
        ({"part": {"max_pixels": 9}, "mm_processor_kwargs": {"max_pixels": 10}}, (None, 9)),
        ({"part": {"max_pixels": 9}, "mm_processor_kwargs": {"max_pixels": 8}}, (None, 8)),
        ({"mm_processor_kwargs": {}}, (None, None)),
        ({"mm_processor_kwargs": None}, (None, None)),
        ({"inside": {"detail": "low"}}, (None, LOW)),
        ({"part": {"detail": "low"}}, (None, LOW)),
        ({"inside": {"detail": "low", "max_pixels": LOW - 1}}, (None, LOW - 1)),
        ({"inside": {"detail": "low", "max_pixels": LOW + 1}}, (None, LOW)),
        ({"inside": {"detail": "high"}}, (None, None)),
        ({"inside": {"detail": "auto"}}, (None, None)),
        ({"inside": {"detail": "original", "max_pixels": 9}}, (None, 9)),
        ({"inside": {"detail": None}}, (None, None)),
        (
            {
                "part": {"cache_control": {"type": "ephemeral"}, "uuid": "x", "other": None},
                "inside": {"prompt_cache_breakpoint": True},
            },
            (None, None),
        ),
    ],
)
def test_bounds_are_read_wherever_they_stand(where: Any, expected: Any) -> None:
    assert image_bounds(**where) == expected


IN_PART = "messages[0].content[0]"


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ({"part": {"min_pixels": 9, "max_pixels": 4}}, f"{IN_PART}: min_pixels 9 is more than max"),
        ({"part": {"min_pixels": 9}, "inside": {"max_pixels": 4}}, "min_pixels 9 is more than max"),
        ({"part": {"max_pixels": 0}}, f"max_pixels must be a whole number from 1 to {MAX_BOUND}"),
        ({"part": {"max_pixels": -1}}, "max_pixels must be a whole number from 1"),
        ({"part": {"max_pixels": MAX_BOUND + 1}}, "max_pixels must be a whole number from 1"),
        ({"part": {"max_pixels": "9"}}, f"{IN_PART}.max_pixels: must be a whole number"),
        ({"part": {"max_pixels": True}}, f"{IN_PART}.max_pixels: must be a whole number"),
        ({"part": {"max_pixels": 9.5}}, f"{IN_PART}.max_pixels: must be a whole number"),
        ({"part": {"format": "png"}}, f"{IN_PART}.format: this field is not supported"),
        ({"inside": {"size": 3}}, f"{IN_PART}.image_url.size: this field is not supported"),
        ({"inside": {"detail": "tiny"}}, f"{IN_PART}.image_url.detail: must be one of low, high"),
        ({"inside": {"detail": 3}}, f"{IN_PART}.image_url.detail: must be one of low, high"),
        ({"inside": {"detail": "low", "min_pixels": LOW + 1}}, "is more than max_pixels 262144"),
        (
            {"mm_processor_kwargs": {"do_resize": False}},
            "mm_processor_kwargs.do_resize: this field is not supported",
        ),
        (
            {"mm_processor_kwargs": {"images_kwargs": {"x": 1}}},
            "mm_processor_kwargs.images_kwargs.x: this field is not supported",
        ),
        ({"mm_processor_kwargs": {"images_kwargs": [1]}}, "images_kwargs: must be an object"),
        ({"mm_processor_kwargs": {"size": 4}}, "size: must be an object with shortest_edge and"),
        (
            {"mm_processor_kwargs": {"size": {"height": 4}}},
            "mm_processor_kwargs.size.height: this field is not supported",
        ),
        ({"mm_processor_kwargs": 3}, "mm_processor_kwargs"),
        (
            {"part": {"max_pixels": 4}, "mm_processor_kwargs": {"min_pixels": 9}},
            "mm_processor_kwargs: min_pixels 9 is more than max_pixels 4",
        ),
    ],
)
def test_wrong_bounds_are_refused_by_name(where: Any, reason: str) -> None:
    assert reason in refusal(**where)


def test_bounds_of_the_whole_request_hold_for_videos_and_those_of_images_do_not() -> None:
    kwargs = {"max_pixels": 9, "images_kwargs": {"max_pixels": 4}}
    image, video = generation({}, {}, mm_processor_kwargs=kwargs).images
    assert (bounds_of(image).max_pixels, bounds_of(video).max_pixels) == (4, 9)
    assert isinstance(video, Video) and video.data == b"picture"


def test_bounds_travel_with_their_items_and_are_recorded() -> None:
    for media in generation({"min_pixels": 4}, {}, mm_processor_kwargs={"max_pixels": 9}).images:
        wanted = bounds_of(media)
        assert wanted.max_pixels == 9
        for found in (item_of(media), recorded_item(media)):
            assert PixelBounds(found.min_pixels, found.max_pixels) == wanted


def test_an_image_over_grpc_has_bounds() -> None:
    images = [
        inference_pb2.Image(data=b"one", min_pixels=4, max_pixels=9),
        inference_pb2.Image(data=b"two"),
    ]
    request = inference_pb2.GenerateRequest(text="x", images=images)
    one, two = split_media(request.SerializeToString(), 4096).media
    assert (bytes_of(one), bounds_of(one)) == (b"one", PixelBounds(4, 9))
    assert (bytes_of(two), bounds_of(two)) == (b"two", NO_BOUNDS)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (inference_pb2.Image(data=b"x", max_pixels=0), "max_pixels must be a whole number from 1"),
        (inference_pb2.Image(data=b"x", min_pixels=9, max_pixels=4), "min_pixels 9 is more than"),
    ],
)
def test_wrong_bounds_are_refused_over_grpc(image: inference_pb2.Image, reason: str) -> None:
    request = inference_pb2.GenerateRequest(images=[image])
    with pytest.raises(InvalidRequest, match=reason):
        split_media(request.SerializeToString(), 4096)


def test_frames_over_grpc_have_no_bounds() -> None:
    frame = inference_pb2.Image(data=b"x", max_pixels=9)
    request = inference_pb2.GenerateRequest(videos=[inference_pb2.Video(frames=[frame])])
    with pytest.raises(InvalidRequest, match="not supported in frames"):
        split_media(request.SerializeToString(), 4096)
