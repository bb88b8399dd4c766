"""Videos through all processes: two ranks, chunks of 7 tokens, static towers, little room."""

import base64
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.preprocess.videos import VideoForm, VideoLimits, open_clip
from tests.golden import GoldenCase
from tests.preprocess.cases import encoded, noise
from tests.system.running import (
    READY_SECONDS,
    Running,
    ask_about,
    data_uri,
    golden_messages,
    text_of,
)

pytestmark = pytest.mark.system
CASE = GoldenCase("e_video")
MESSAGES = golden_messages(CASE.path)
FRAMES = [(CASE.inputs / f"frame_{n}.png").read_bytes() for n in range(4)]
QUESTION = MESSAGES[0]["content"][1]["text"]
ANSWER = CASE.expected["greedy_ids"]
PLAIN = {
    "ignore_eos": True,
    "repetition_penalty": 1.0,
    "skip_special_tokens": False,
    "return_token_ids": True,
    "max_tokens": len(ANSWER),
}
KV_BYTES_PER_TOKEN = 1024
"""On one of two ranks."""
CONTEXT = 304


@pytest.fixture(scope="module")
def system() -> Iterator[Running]:
    model = ["--model", str(CASE.checkpoint), "--dtype", "float32"]
    members = ["--tp", "2", "--llm", "2", "--vision", "2", "--vision-buckets", "64,256"]
    room = ["--max-model-len", str(CONTEXT), "--kv-memory", str(CONTEXT * KV_BYTES_PER_TOKEN)]
    with Running(*model, *members, *room, "--max-num-batched-tokens", "7") as running:
        yield running


def ask(system: Running, messages: list[dict[str, Any]]) -> dict[str, Any]:
    status, answer = system.chat(messages, **PLAIN)
    assert status == 200, answer
    return answer


def ids_of(answer: dict[str, Any]) -> list[int]:
    return answer["choices"][0]["token_ids"]


def with_fps(fps: float) -> list[dict[str, Any]]:
    [video, text] = MESSAGES[0]["content"]
    return [{"role": "user", "content": [video | {"fps": fps}, text]}]


def file_part(file: bytes, **fields: Any) -> dict[str, Any]:
    url = "data:video/mp4;base64," + base64.b64encode(file).decode()
    return {"type": "video_url", "video_url": {"url": url}, **fields}


def test_the_golden_video_in_flight_with_others_equals_the_reference(system: Running) -> None:
    picture = ask_about(encoded(noise(84, 112)), "What is it?")
    [image], [video, text] = ([picture[0]["content"][0]], MESSAGES[0]["content"])
    mixed = [{"role": "user", "content": [image, video, text]}]
    asked = [MESSAGES, picture, mixed, with_fps(8.0)]
    alone = [ask(system, messages) for messages in asked]
    assert alone[0]["prompt_token_ids"] == CASE.expected["input_ids"]
    assert alone[0]["usage"]["prompt_tokens_details"]["image_tokens"] == 40
    assert ids_of(alone[0]) == ANSWER
    assert len({tuple(ids_of(answer)) for answer in alone}) == len(alone)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda messages: ask(system, messages), asked * 4))
    assert [ids_of(answer) for answer in together] == [ids_of(answer) for answer in alone] * 4


def test_a_prefix_with_a_video_is_cached_for_its_own_speed_alone(system: Running) -> None:
    for fps in (0.7, 0.9):
        cached = [
            ask(system, with_fps(fps))["usage"]["prompt_tokens_details"]["cached_tokens"]
            for _ in range(3)
        ]
        assert cached[0] <= 25 + 20, "the text before the video and its first step are shared"
        assert cached[-1] >= 80


def test_grpc_takes_frames_and_places_them_by_their_placeholders(system: Running) -> None:
    image_id, video_id = (
        json.loads((CASE.checkpoint / "config.json").read_text())[f"{kind}_token_id"]
        for kind in ("image", "video")
    )
    picture = encoded(noise(84, 112))
    video = inference_pb2.Video(frames=[inference_pb2.Image(data=f) for f in FRAMES], fps=0.5)
    expanded = CASE.expected["input_ids"]
    first = expanded.index(video_id)
    ids = [*expanded[: first + 1], *expanded[first + 40 :]]
    swapped = [*ids[:-2], image_id, *ids[-2:]]
    sampling = inference_pb2.SamplingParams(temperature=0, repetition_penalty=1)
    stopping = inference_pb2.StoppingParams(max_tokens=len(ANSWER), ignore_eos=True)
    common = {"sampling": sampling, "stopping": stopping, "videos": [video]}
    with grpc.insecure_channel(f"127.0.0.1:{system.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        requests = [
            inference_pb2.GenerateRequest(text=QUESTION, **common),
            inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=ids), **common),
        ]
        found = [list(stub.Generate(r, timeout=READY_SECONDS).token_ids) for r in requests]
        assert found == [ANSWER, ANSWER]
        both = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=swapped),
            images=[inference_pb2.Image(data=picture)],
            **common,
        )
        answer = stub.Generate(both, timeout=READY_SECONDS)
        assert answer.usage.image_tokens == 40 + 12
        del both.images[:]
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(both, timeout=READY_SECONDS)
        assert "1 image placeholders for 0 images" in str(caught.value)


def test_a_file_is_answered_as_its_frames_are(system: Running, tmp_path: Path) -> None:
    videos = pytest.importorskip("tests.videos", exc_type=ImportError)
    file = videos.encoded_video([noise(56, 84, seed // 4) for seed in range(16)], 8)
    clip = open_clip(file, VideoForm(fps=2.5), VideoLimits())
    frames = []
    for frame in clip.frames():
        buffer = BytesIO()
        frame.save(buffer, "PNG")
        frames.append(data_uri(buffer.getvalue()))
    listed = {"type": "video", "video": frames, "fps": clip.fps}
    text = {"type": "text", "text": QUESTION}
    found = [
        ask(system, [{"role": "user", "content": [part, text]}])
        for part in (file_part(file, fps=2.5), listed)
    ]
    assert ids_of(found[0]) == ids_of(found[1])
    path = tmp_path / "clip.mp4"
    path.write_bytes(file)
    shown = system.twinlens(
        "generate", QUESTION, "--video", str(path), "--fps", "2.5", "--max-tokens", "8", "--json"
    )
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["usage"]["image_tokens"] == 2 * 2 * 3


@pytest.mark.parametrize(
    ("part", "status", "reason"),
    [
        ({"type": "video", "video": [data_uri(b"junk")]}, 400, "frame 0: this is text"),
        ({"type": "video", "video": [data_uri(FRAMES[0])] * 300}, 413, "at most 128 are taken"),
        ({"type": "video_url", "video_url": "http://127.0.0.1/x.mp4"}, 400, "by-URL videos"),
    ],
    ids=["broken", "too many", "address"],
)
def test_what_is_no_video_is_refused(
    system: Running, part: dict[str, Any], status: int, reason: str
) -> None:
    content = [part, {"type": "text", "text": QUESTION}]
    found, answer = system.chat([{"role": "user", "content": content}])
    assert (found, reason in answer["error"]["message"]) == (status, True), answer
    assert text_of(system.chat(MESSAGES, max_tokens=4)[1])


def test_answers_about_a_video_survive_the_death_of_a_language_group(system: Running) -> None:
    victims = [system.members("llm")[0].pid]

    def stream(number: int) -> list[int]:
        token_ids: list[int] = []
        for event in system.stream(MESSAGES, **PLAIN):
            assert "error" not in event, event
            for choice in event["choices"]:
                token_ids += choice.get("token_ids", [])
            if number == 0 and len(token_ids) > 3 and victims:
                os.kill(victims.pop(), signal.SIGKILL)
        return token_ids

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(stream, range(8)))
    assert found == [ANSWER] * 8
    assert system.logged(event="retrying"), "the victim held an answer"
