"""Videos in a request of either API: their parts, counts and sizes, and how they travel."""

import base64
import json
from typing import Any

import pytest

from common.errors import InvalidRequest, TooLarge, UnreadableImage
from common.messages import MAX_FRAMES
from common.wire import Tensor
from proto.twinlens.inference.v1 import inference_pb2
from services.gateway import images
from services.gateway.generation import GenerationRequest
from services.gateway.grpc_messages import to_generation
from services.gateway.grpc_wire import split_media
from services.gateway.schema import chat_to_generation, parse_chat
from services.gateway.videos import Video, check_media, item_of


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()


IMAGE = {"type": "image_url", "image_url": {"url": uri(b"picture")}}
FRAMES = {"type": "video", "video": [uri(b"one"), uri(b"second")], "fps": 0.5}
FILE = {"type": "video_url", "video_url": {"url": uri(b"film", "video/mp4")}}


def generation(*parts: Any, role: str = "user") -> GenerationRequest:
    body = json.dumps({"messages": [{"role": role, "content": list(parts)}]})
    return chat_to_generation(parse_chat(body.encode()), "id", None, 4096)


def refusal(*parts: Any, kind: type[InvalidRequest] = InvalidRequest, **more: Any) -> str:
    with pytest.raises(kind) as caught:
        generation(*parts, **more)
    return caught.value.message


def test_images_and_videos_keep_their_order() -> None:
    asked = generation(FRAMES, IMAGE, FILE | {"fps": 3})
    frames = Video(b"onesecond", (3, 6), 0.5)
    assert asked.images == (frames, b"picture", Video(b"film", fps=3.0))
    kinds = [part["type"] for part in json.loads(asked.prompt)[0]["content"]]
    assert kinds == ["video", "image", "video"]
    assert [len(one) for one in asked.images] == [9, 7, 4]
    for part in ({"type": "video", "video": uri(b"film")}, FILE | {"video_url": uri(b"film")}):
        assert generation(part).images == (Video(b"film"),)


def test_a_video_travels_with_the_lengths_of_its_frames() -> None:
    frames, image, file = map(item_of, generation(FRAMES, IMAGE, FILE).images)
    assert (frames.kind, frames.data.bytes(), frames.fps) == ("video", b"onesecond", 0.5)
    assert frames.frame_lengths == Tensor.of_int64([3, 6])
    assert (image.kind, image.frame_lengths, image.fps) == ("image", None, None)
    assert (file.kind, file.data.bytes(), file.frame_lengths) == ("video", b"film", None)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "video"}, "messages[0].content[0].video: must be a data: URI of a file, or a"),
        ({"type": "video", "video": []}, "video: must be a data: URI of a file, or a list"),
        ({"type": "video", "video": [uri(b"x"), 3]}, "video[1]: must be a data: URI of an image"),
        ({"type": "video", "video": ["http://x/"]}, "video[0]: by-URL frames are not enabled"),
        ({"type": "video_url"}, "content[0].video_url: must be an object with a url, or a string"),
        ({"type": "video_url", "video_url": "https://x/"}, "by-URL videos are not enabled"),
        ({"type": "video_url", "video_url": "file:///etc"}, "only videos inside the request"),
        (FRAMES | {"fps": 0}, "fps: must be a number from 0.01 to 1000"),
        (FRAMES | {"fps": "2"}, "fps: must be a number"),
        (FRAMES | {"fps": True}, "fps: must be a number"),
        (FILE | {"max_pixels": "9"}, "messages[0].content[0].max_pixels: must be a whole number"),
        (FILE | {"nframes": 4}, "nframes: this field is not supported"),
    ],
)
def test_a_refusal_names_the_field_and_what_is_wrong(part: dict[str, Any], reason: str) -> None:
    assert reason in refusal(part)


def test_only_users_show_videos() -> None:
    assert "a video is not allowed in a message of role 'system'" in refusal(FRAMES, role="system")


def test_too_many_or_too_large_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    part = {"type": "video", "video": [uri(b"x")] * (MAX_FRAMES // 2)}
    assert len(generation(part, part).images) == 2
    assert "more than 768 frames" in refusal(part, part, FRAMES, kind=TooLarge)
    generation(*[FILE] * 31, IMAGE)
    assert "more than 32 images and videos" in refusal(*[FILE] * 32, IMAGE, kind=TooLarge)
    empty = FRAMES | {"video": [uri(b"x"), uri(b"")]}
    assert "a frame of video 1 is empty" in refusal(IMAGE, empty, kind=UnreadableImage)
    monkeypatch.setitem(images.MAX_FILE_BYTES, "video", 3)
    assert "video 0 is larger than" in refusal(FILE, kind=TooLarge)
    monkeypatch.setitem(images.MAX_FILE_BYTES, "frame", 5)
    assert "a frame of video 0 is larger than" in refusal(FRAMES, kind=TooLarge)


# gRPC


def frames_of(*data: bytes) -> list[inference_pb2.Image]:
    return [inference_pb2.Image(data=one) for one in data]


def split(*videos: inference_pb2.Video, **fields: Any) -> tuple[Any, ...]:
    request = inference_pb2.GenerateRequest(videos=videos, **fields)
    return split_media(request.SerializeToString(), 4096).media


def test_grpc_takes_frames_or_a_file() -> None:
    frames = inference_pb2.Video(frames=frames_of(b"one", b"second"), fps=0.5)
    media = split(frames, inference_pb2.Video(file=b"film"), images=frames_of(b"picture"))
    assert media == (b"picture", Video(b"onesecond", (3, 6), 0.5), Video(b"film"))
    request = inference_pb2.GenerateRequest(text="What?")
    asked = to_generation(request, media, "id", None, 4096)
    kinds = [part["type"] for part in json.loads(asked.prompt)[0]["content"]]
    assert kinds == ["image", "video", "video", "text"]


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (inference_pb2.Video(), "either the frames or the file"),
        (inference_pb2.Video(file=b"x", frames=frames_of(b"y")), "either the frames or the file"),
        (inference_pb2.Video(file=b"x", fps=float("nan")), "fps: must be a number from"),
        (inference_pb2.Video(file=b"x", fps=1e9), "fps: must be a number from"),
        (inference_pb2.Video(frames=frames_of(*[b"x"] * 769)), "more than 768 frames"),
    ],
    ids=["empty", "both", "nan", "fast", "many"],
)
def test_grpc_refuses_what_is_no_video(video: inference_pb2.Video, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        split(video)


def test_grpc_bounds_what_all_videos_have_together() -> None:
    half = inference_pb2.Video(frames=frames_of(*[b"x"] * 400))
    with pytest.raises(TooLarge, match="more than 768 frames"):
        split(half, half)
    with pytest.raises(TooLarge, match="more than 32 images and videos"):
        split(*[inference_pb2.Video(file=b"x")] * 32, images=frames_of(b"y"))
    with pytest.raises(UnreadableImage, match="a frame of video 0 is empty"):
        check_media(split(inference_pb2.Video(frames=frames_of(b"x", b""))))
