"""Videos become patches, tokens and positions as in the reference; what is no video is refused."""

import json
import struct
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.checkpoint import open_checkpoint
from common.errors import InvalidRequest, TooLarge, UnreadableImage
from common.messages import Item, Prompt, Submit
from common.wire import Tensor
from services.preprocess import images, videos
from services.preprocess.families.qwen2_5_vl import time_positions, video_patches
from services.preprocess.submit_checks import check_item
from services.preprocess.videos import VideoForm, VideoLimits, open_clip, sampled
from tests.fakes import received
from tests.golden import GoldenCase, max_difference
from tests.preprocess.builders import Preprocess, create_preprocessor, failures, submit
from tests.preprocess.cases import encoded, noise
from tests.preprocess.test_qwen2_5_vl import MEAN, STD
from tests.videos import encoded_video, grey_frames, sound

CASE = GoldenCase("e_video")
CHECKPOINT = open_checkpoint(CASE.checkpoint)
PREPROCESSOR = create_preprocessor(CHECKPOINT)
FRAMES = [(CASE.inputs / f"frame_{n}.png").read_bytes() for n in range(4)]
MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "video"}, {"type": "text", "text": "What happens in the video?"}],
    }
]
LIMITS = VideoLimits()


def listed(frames: list[bytes], fps: float | None = None) -> tuple[bytes, VideoForm]:
    return b"".join(frames), VideoForm(tuple(map(len, frames)), fps)


def prepare(frames: list[bytes], fps: float | None = None, **limits: Any) -> Any:
    preprocessor = create_preprocessor(CHECKPOINT, **limits) if limits else PREPROCESSOR
    data, form = listed(frames, fps)
    return preprocessor.prepare_item("video", data, form=form)


def pictures(*sizes: tuple[int, int]) -> list[bytes]:
    return [encoded(noise(*size, seed)) for seed, size in enumerate(sizes)]


# The golden case


def test_the_golden_video_becomes_the_references_prompt_and_pixels() -> None:
    item = prepare(FRAMES, 0.5)
    assert [list(item.grid_thw)] == CASE.expected["video_grid_thw"]
    assert [item.step_seconds] == CASE.expected["second_per_grid_ts"]
    token_ids = PREPROCESSOR.encode(PREPROCESSOR.render(MESSAGES))
    prompt = PREPROCESSOR.expand(token_ids, [item])
    assert prompt.token_ids.tolist() == CASE.expected["input_ids"]
    assert np.array_equal(prompt.positions, CASE.tensors["position_ids"])
    assert prompt.rope_delta == CASE.expected["rope_delta"]
    pixels = item.patches().reshape(-1, 3, 2, 196).astype(np.float32) / 255
    found = (pixels - MEAN[:, None, None]) / STD[:, None, None]
    assert max_difference(found.reshape(-1, 1176), CASE.tensors["pixel_values_videos"]) <= 1e-5


def test_another_speed_changes_the_positions_and_not_the_name_of_the_content() -> None:
    slow, fast = prepare(FRAMES, 0.5), prepare(FRAMES, 2)
    assert slow.mm_hash == fast.mm_hash
    token_ids = PREPROCESSOR.encode(PREPROCESSOR.render(MESSAGES))
    prompts = [PREPROCESSOR.expand(token_ids, [item]) for item in (slow, fast)]
    assert np.array_equal(prompts[0].token_ids, prompts[1].token_ids)
    assert not np.array_equal(prompts[0].positions, prompts[1].positions)
    reversed_hash = prepare(FRAMES[::-1], 0.5).mm_hash
    assert len({slow.mm_hash, reversed_hash, prepare(FRAMES[:2]).mm_hash}) == 3


@pytest.mark.parametrize(
    ("fps", "positions"),
    [
        (2.0, [0, 2, 4, 6]),
        (3.0, [0, 1, 2, 4]),  # 2 / 3 of a second, times 2, rounded down
        (1.92, [0, 2, 4, 6]),
        (8.0, [0, 0, 1, 1]),
    ],
)
def test_positions_in_time_are_rounded_down(fps: float, positions: list[int]) -> None:
    item = prepare(pictures(*[(56, 56)] * 8), fps)
    assert time_positions(item, 2).tolist() == positions


# Frames


def test_an_odd_frame_is_repeated() -> None:
    frames = pictures((56, 56), (56, 56), (56, 56))
    odd, even = prepare(frames), prepare([*frames, frames[2]])
    assert odd.grid_thw == (2, 4, 4) and odd.mm_hash == even.mm_hash
    assert prepare(frames[:1]).grid_thw == (1, 4, 4)


def test_all_frames_get_the_size_of_the_first() -> None:
    assert prepare(pictures((100, 56), (30, 200))).content_size == (112, 56)


def test_patches_hold_the_frames_of_a_step_by_channel() -> None:
    frames = np.stack([noise(28, 56, seed) for seed in range(4)])
    found = video_patches(frames, 14, 2, 2).reshape(2, 2, 2, 2, 3, 2, 14, 14)
    for step, column, row, inner, channel, frame in np.ndindex(2, 2, 2, 2, 3, 2):
        x = 14 * (2 * column + inner)
        pixels = frames[2 * step + frame, 14 * row : 14 * row + 14, x : x + 14, channel]
        assert np.array_equal(found[step, column, row, inner, channel, frame], pixels)


def test_frames_shrink_until_the_video_fits() -> None:
    frames = pictures(*[(560, 560)] * 6)
    assert prepare(frames).num_tokens == 3 * 400
    assert prepare(frames, max_pixels=100 * 784).num_tokens == 3 * 100
    data, form = listed(frames)
    small = PREPROCESSOR.prepare_item("video", data, 4 * 90, form)
    assert small.num_patches <= 4 * 90 and small.num_tokens > 60
    strict = create_preprocessor(CHECKPOINT, resizes_oversized=False)
    with pytest.raises(TooLarge, match="its 6 frames become more than 90 tokens"):
        strict.prepare_item("video", data, 4 * 90, form)
    with pytest.raises(TooLarge, match="its 6 frames become more than 2 tokens"):
        PREPROCESSOR.prepare_item("video", data, 4 * 2, form)


def test_a_video_takes_no_more_than_its_share_of_the_context() -> None:
    item = prepare([encoded(noise(1120, 1120))] * 10)
    assert 3000 < item.num_tokens <= 0.9 * CHECKPOINT.max_model_len


def test_a_broken_frame_is_named() -> None:
    with pytest.raises(UnreadableImage, match="frame 1: this is text"):
        prepare([FRAMES[0], b"junk"])
    with pytest.raises(UnreadableImage, match="frame 2: the image is a broken or cut off PNG"):
        prepare([*FRAMES[:2], FRAMES[2][:-2000]])


def test_too_many_frames_or_pixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data, form = listed(FRAMES)
    with pytest.raises(TooLarge, match="it has 4 frames, at most 2 are taken"):
        open_clip(data, form, VideoLimits(max_frames=2))
    monkeypatch.setattr(videos, "MAX_PIXELS", 3 * 140 * 112)
    with pytest.raises(TooLarge, match="more than 47040 pixels together"):
        open_clip(data, form, LIMITS)


def test_lengths_that_are_not_those_of_the_frames_are_refused() -> None:
    data = Tensor.of_bytes(b"abcdef")
    check_item(Item("video", data, Tensor.of_int64([2, 4])), "video 0")
    for lengths in ([2, 3], [], [0, 6], [-1, 7], [2**62, 2**62], [1] * 7):
        with pytest.raises(InvalidRequest, match="video 0: "):
            check_item(Item("video", data, Tensor.of_int64(lengths)), "video 0")
    with pytest.raises(InvalidRequest, match="image 0: "):
        check_item(Item("image", data, Tensor.of_int64([6])), "image 0")


# Files


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "mpeg4"), ("mp4", "libx264"), ("webm", "libvpx"), ("webm", "libvpx-vp9")],
)
def test_a_file_gives_frames_that_are_evenly_apart(container: str, codec: str) -> None:
    file = encoded_video(grey_frames(25), 8, container, codec)
    clip = open_clip(file, VideoForm(), LIMITS)
    assert (clip.size, clip.num_frames, clip.num_images) == ((56, 84), 6, 8)
    assert clip.fps == pytest.approx(6 / 25 * 8)
    values = [np.asarray(frame).mean() for frame in clip.frames()]
    assert np.abs(np.array(values) - [0, 50, 100, 140, 190, 240]).max() < 4
    asked = open_clip(file, VideoForm(fps=4), LIMITS)
    assert asked.num_frames == 12
    few = open_clip(file, VideoForm(fps=4), VideoLimits(max_frames=5))
    assert few.num_frames == 4 and few.fps == pytest.approx(4 / 25 * 8)


def test_sound_is_left_alone() -> None:
    file = encoded_video(grey_frames(25), 8, "mp4", "libx264", has_sound=True)
    clip = open_clip(file, VideoForm(), LIMITS)
    assert (clip.num_frames, len([*clip.frames()])) == (6, 6)


def test_a_file_that_was_filmed_sideways_is_turned() -> None:
    """Phones note in the header how a film is to be turned: here clockwise, by a right angle."""
    pixels = np.zeros((56, 84, 3), np.uint8)
    pixels[:, :20] = 255
    file = bytearray(encoded_video([pixels] * 4))
    matrix = file.index(b"tkhd") + 44
    one, none = (1 << 16), 0
    turned = (none, one, none, -one, none, none, none, none, 1 << 30)
    file[matrix : matrix + 36] = struct.pack(">9i", *turned)
    clip = open_clip(bytes(file), VideoForm(), LIMITS)
    assert clip.size == (84, 56)
    [first, *_] = clip.frames()
    assert np.asarray(first)[:16].mean() > 240 and np.asarray(first)[30:].mean() < 15


def test_a_file_becomes_an_item_with_the_times_of_its_frames() -> None:
    item: Any = PREPROCESSOR.prepare_item("video", encoded_video(grey_frames(25)))
    assert item.kind == "video" and item.grid_thw == (3, 4, 6)
    assert item.step_seconds == pytest.approx(2 / 1.92)


@given(
    st.integers(1, 5000),
    st.floats(0.1, 120),
    st.floats(0.01, 60),
    st.integers(2, 768),
)
def test_sampled_frames_are_an_even_number_from_the_first_to_the_last(
    total: int, rate: float, fps: float, most: int
) -> None:
    found = sampled(total, rate, fps, most)
    assert found == sorted(found) and found[0] == 0
    assert len(found) <= most and (len(found) % 2 == 0 or total == 1)
    assert len(found) == 1 or found[-1] == total - 1
    wanted = total / rate * fps
    if 4 <= wanted <= min(total, most):
        assert wanted - 2 < len(found) <= wanted


@pytest.mark.parametrize(
    ("total", "rate", "fps", "count"),
    [(300, 30.0, 2.0, 20), (30, 30.0, 2.0, 4), (3, 30.0, 2.0, 2), (2, 1.0, 1.0, 2), (1, 1, 1, 1)],
)
def test_the_number_of_sampled_frames_is_the_references(
    total: int, rate: float, fps: float, count: int
) -> None:
    assert len(sampled(total, rate, fps, 768)) == count


@pytest.mark.parametrize("container", ["mp4", "webm"])
def test_a_file_that_is_cut_off_is_refused_or_read_up_to_there(container: str) -> None:
    codec = {"mp4": "mpeg4", "webm": "libvpx"}[container]
    file = encoded_video([noise(56, 84, seed) for seed in range(25)], 8, container, codec)
    outcomes = set()
    for cut in range(0, len(file), len(file) // 40):
        try:
            clip = open_clip(file[:cut], VideoForm(), LIMITS)
            assert len([*clip.frames()]) == clip.num_frames
            outcomes.add("read")
        except UnreadableImage:
            outcomes.add("refused")
    assert "refused" in outcomes


def test_bytes_that_were_changed_end_in_a_refusal_or_in_frames() -> None:
    file = encoded_video(grey_frames(8), 8, "webm", "libvpx")
    random = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(file)
        for place in random.integers(4, len(file), 8):
            changed[place] = random.integers(256)
        try:
            clip = open_clip(bytes(changed), VideoForm(), LIMITS)
            assert len([*clip.frames()]) == clip.num_frames
        except InvalidRequest:
            pass


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"#EXTM3U\nhttp://127.0.0.1/x.ts\n", "not a video in one of the formats MP4, WebM"),
        (b"", "not a video in one of the formats"),
        (encoded(noise(8, 8)), "not a video in one of the formats"),
        (b"\0\0\0\x18ftypisom" + b"\0" * 40, "broken or cut off"),
        (sound(), "the file has no video"),
        (encoded_video(grey_frames(3), 8, "matroska", "mjpeg"), "mjpeg is not decoded here"),
    ],
    ids=["playlist", "empty", "picture", "head", "sound", "codec"],
)
def test_what_is_no_video_is_refused(file: bytes, message: str) -> None:
    with pytest.raises(UnreadableImage, match=message):
        open_clip(file, VideoForm(), LIMITS)


def test_a_file_with_huge_frames_is_refused_before_one_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = encoded_video(grey_frames(3))
    monkeypatch.setattr(images, "MAX_PIXELS", 4000)
    with pytest.raises(TooLarge, match="the video has 84x56 pixels, at most 4000"):
        open_clip(file, VideoForm(), LIMITS)


def test_a_file_with_too_many_frames_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "MAX_PACKETS", 20)
    with pytest.raises(TooLarge, match="more than 20 frames"):
        open_clip(encoded_video(grey_frames(25)), VideoForm(), LIMITS)


def test_without_pyav_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InvalidRequest, match=r"install twinlens\[video\]"):
        open_clip(encoded(noise(8, 8)), VideoForm(), LIMITS)
    data, form = listed(FRAMES)
    assert open_clip(data, form, LIMITS).num_frames == 4


# Requests


def test_a_model_without_videos_says_so() -> None:
    checkpoint = open_checkpoint(GoldenCase("a_image", "wemm").checkpoint)
    other = create_preprocessor(checkpoint)
    other.check_kinds(["image"])
    with pytest.raises(InvalidRequest, match="video 1: this model takes no videos, only images"):
        other.check_kinds(["image", "video"])


def handed_over(message: Submit) -> Prompt:
    sent = Preprocess("vision-1", preprocessor=PREPROCESSOR).play(
        received("gateway-1", "gateway", message)
    )
    assert not failures(sent), sent
    [prompt] = [message for _, message in sent if isinstance(message, Prompt)]
    return prompt


def mixed_items() -> tuple[Item, Item, Item]:
    data, form = listed(FRAMES)
    video = Item("video", Tensor.of_bytes(data), Tensor.of_int64(form.frame_lengths), 0.5)
    first, second = (Item("image", Tensor.of_bytes(file)) for file in pictures((56, 56), (84, 56)))
    return first, second, video


def test_images_and_videos_mix_in_one_request() -> None:
    first, second, video = mixed_items()
    content = [{"type": kind} for kind in ("image", "video", "image")]
    message = submit_message()
    message.prompt = Tensor.of_text(json.dumps([{"role": "user", "content": content}]))
    message.items = (first, video, second)
    prompt = handed_over(message)
    assert prompt.placeholders.numpy()[:, 1].tolist() == [4, 40, 6]


def test_items_of_a_prompt_of_token_ids_stand_in_the_order_of_their_placeholders() -> None:
    """A client gives the images first, wherever the placeholders of the videos are."""
    first, second, video = mixed_items()
    ids = PREPROCESSOR.placeholder_ids
    image_id, video_id = ids["image"], ids["video"]
    token_ids = Tensor.of_int64([1, video_id, 2, image_id, 3, image_id])
    message = submit_message()
    message.prompt_kind = "token_ids"
    message.prompt = token_ids
    message.items = (first, second, video)
    prompt = handed_over(message)
    assert prompt.placeholders.numpy()[:, 1].tolist() == [40, 4, 6]
    assert bytes(prompt.mm_hashes.numpy()[0]).hex() == prepare(FRAMES).mm_hash
    message.items = (first, video)
    sent = Preprocess("vision-1", preprocessor=PREPROCESSOR).play(
        received("gateway-1", "gateway", message)
    )
    assert [code for _, _, code, _ in failures(sent)] == ["InvalidRequest"]


def submit_message() -> Submit:
    [event] = submit("r")
    message: Any = event
    return message.message
