"""A recording has every admitted request, each file once, how each ended, and never a key."""

import asyncio
import errno
import os
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from common.config import BadSetting
from common.errors import Exhausted
from common.messages import Sampling, Usage
from common.recording import BadRecording, Recording, read_recording
from common.settings import GatewaySettings
from services.gateway import recording_file
from services.gateway.generation import Began, GenerationRequest, Piece, Result
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from services.gateway.recorder import Recorder, start_recorder
from services.gateway.videos import Video
from tests.gateway.fake_core import FOREVER, TIMINGS, FakeCore
from tests.system.running import ask_about

PNG = b"\x89PNG\r\n\x1a\n not decoded here"
SECRET = "sk-a-key-that-nobody-may-see"


def settings(path: Path, mib: int = 8) -> GatewaySettings:
    return GatewaySettings(record=str(path), record_mib=mib, served_model_name="org/tiny")


def recorder_of(path: Path, mib: int = 8) -> Recorder:
    recorder = start_recorder(settings(path, mib))
    assert recorder is not None
    return recorder


def request(**fields: Any) -> GenerationRequest:
    whole = {"request_id": "r", "prompt_kind": "messages", "prompt": b"[]"} | fields
    return GenerationRequest(**whole)


async def ask(recorder: Recorder, core: FakeCore, *requests: GenerationRequest) -> None:
    """Let the core answer requests that the recorder observes."""
    measured = MeasuredCore(core, observers=[recorder])
    for one in requests:
        async with measured.generate(one) as events:
            async for _ in events:
                pass


async def record(
    path: Path, core: FakeCore, *requests: GenerationRequest, mib: int = 8
) -> Recording:
    recorder = recorder_of(path, mib)
    await ask(recorder, core, *requests)
    recorder.close()
    return read_recording(path)


async def test_a_request_and_its_end_are_recorded(tmp_path: Path) -> None:
    sent = request(
        sampling=Sampling(temperature=0.5, seed=7), timeout=9.0, guide_kind="regex", guide="a+"
    )
    recording = await record(tmp_path / "traffic", FakeCore(), sent)
    [exchange] = recording.exchanges
    asked, answered = exchange.asked, exchange.answered
    assert answered is not None
    assert (asked.prompt_kind, asked.prompt, asked.task, asked.api) == (
        "messages",
        b"[]",
        "generate",
        "http",
    )
    assert (asked.sampling, asked.stopping) == (sent.sampling, sent.stopping)
    assert (asked.guide_kind, asked.guide, asked.timeout) == ("regex", "a+", 9.0)
    assert (answered.outcome, answered.text, answered.token_ids) == ("stop", "Hello", [10, 11, 12])
    assert answered.usage == Usage(
        prompt_tokens=9, image_tokens=4, completion_tokens=3, cached_tokens=2
    )
    assert answered.timings == TIMINGS
    assert answered.first_token_seconds is not None
    assert 0 <= answered.first_token_seconds <= answered.seconds
    [run] = recording.runs
    assert run.model == "org/tiny"


async def test_each_file_is_stored_once(tmp_path: Path) -> None:
    video = Video(b"frame oneframe two", (9, 9), 2.0)
    requests = [request(images=(PNG, bytearray(PNG))), request(images=(PNG, video))]
    recording = await record(tmp_path / "traffic", FakeCore(), *requests)
    assert recording.num_files == 2
    assert (tmp_path / "traffic").read_bytes().count(PNG) == 1
    first, second = (exchange.asked.items for exchange in recording.exchanges)
    assert first[0] == first[1] == second[0]
    assert recording.read_file(first[0].hash) == PNG
    assert (second[1].kind, second[1].frame_lengths, second[1].fps) == ("video", (9, 9), 2.0)
    assert recording.read_file(second[1].hash) == video.data


async def test_errors_aborts_and_results_are_recorded(tmp_path: Path) -> None:
    recorder = recorder_of(tmp_path / "traffic")
    with pytest.raises(Exhausted):
        error = Exhausted("too much", stage="llm")
        await ask(recorder, FakeCore(Began(None), Piece(0, [5], "a", []), error), request())
    core = FakeCore(Began(None), Piece(0, [5, 6], "ab", []), FOREVER)
    asking = asyncio.create_task(ask(recorder, core, request()))
    await core.waiting.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    result = Result(np.array([0.25, 0.75], np.float32), ["a", "b"], Usage(), {})
    await ask(recorder, FakeCore(Began(None), result), request(task="classify"))
    with pytest.raises(Exhausted):
        await ask(recorder, FakeCore(refusal=Exhausted("full", stage="gateway")), request())
    recorder.close()
    failed, aborted, pooled = [e.answered for e in read_recording(tmp_path / "traffic").exchanges]
    assert failed and aborted and pooled
    assert (failed.outcome, failed.error, failed.error_stage) == ("Exhausted", "too much", "llm")
    assert (aborted.outcome, aborted.token_ids, aborted.text) == ("aborted", [5, 6], "ab")
    assert pooled.outcome == "pooled"
    assert np.frombuffer(pooled.values, "<f4").tolist() == [0.25, 0.75]


def test_a_key_is_never_recorded(tmp_path: Path) -> None:
    path = tmp_path / "traffic"
    recorder = recorder_of(path)
    core = MeasuredCore(FakeCore(), observers=[recorder])
    headers = {"authorization": f"Bearer {SECRET}", "cookie": SECRET, "x-api-key": SECRET}
    with TestClient(create_app(core)) as client:
        body = {"messages": ask_about(PNG, "What is this?"), "user": SECRET}
        url = "/v1/chat/completions?key=" + SECRET
        assert client.post(url, json=body, headers=headers).status_code == 200
    recorder.close()
    assert len(read_recording(path).exchanges) == 1
    written = path.read_bytes()
    assert b"What is this?" in written and SECRET.encode() not in written


def test_only_its_owner_may_read_the_file(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        recorder_of(tmp_path / "traffic").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "traffic").stat().st_mode) == 0o600


async def test_a_gateway_that_starts_again_appends_after_the_last_whole_record(
    tmp_path: Path,
) -> None:
    path = tmp_path / "traffic"
    await record(path, FakeCore(), request(images=(PNG,)), request())
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    cut = read_recording(path)
    assert cut.is_cut_off
    assert [bool(exchange.answered) for exchange in cut.exchanges] == [True, False]
    recording = await record(path, FakeCore(), request(images=(PNG,)))
    assert not recording.is_cut_off and len(recording.runs) == 2
    assert [bool(exchange.answered) for exchange in recording.exchanges] == [True, False, True]
    arrivals = [exchange.arrival for exchange in recording.exchanges]
    assert arrivals == sorted(arrivals) and arrivals[0] == 0


async def test_a_recording_cut_off_anywhere_is_readable_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "traffic"
    await record(path, FakeCore(), request(images=(PNG,)), request())
    whole = path.read_bytes()
    counts = []
    for length in [*range(0, len(whole), 23), len(whole)]:
        path.write_bytes(whole[:length])
        try:
            counts.append(len(read_recording(path).exchanges))
        except BadRecording:
            assert not counts, f"readable before byte {length}, but not there"
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 2


async def test_a_full_recording_ends_with_one_line_and_keeps_the_ends(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "traffic"
    large = [request(images=(bytes([n]) * 300_000,)) for n in range(5)]
    recording = await record(path, FakeCore(), *large, mib=1)
    assert len(recording.exchanges) == 3
    assert all(exchange.answered for exchange in recording.exchanges)
    assert path.stat().st_size <= 2**20
    assert "".join(capfd.readouterr()).count("the recording has its size") == 1


class FailingDisk:
    """A file on a disk that fails after some bytes, in the middle of a record."""

    def __init__(self, path: Path, room: int) -> None:
        self.file = recording_file.open_recording(path)
        self.room = room

    def write(self, data: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(bytes(data[: self.room]))
        self.room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


async def test_a_full_disk_ends_the_recording_and_not_the_service(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "traffic"
    disk: Any = FailingDisk(path, room=1500)
    recorder = Recorder(recording_file.RecordingFile(disk, 2**20, "org/tiny"))
    for _ in range(10):
        await ask(recorder, FakeCore(), request())
    recorder.close()
    recording = read_recording(path)
    assert 0 < len(recording.exchanges) < 10 and not recording.is_cut_off
    assert "".join(capfd.readouterr()).count("the disk failed") == 1


async def test_requests_are_dropped_when_the_disk_is_too_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recording_file, "MAX_HELD_BYTES", 250_000)
    recorder = recorder_of(tmp_path / "traffic")
    disk_is_done = threading.Event()
    recorder.file.submit(disk_is_done.wait, 0)
    await ask(recorder, FakeCore(), *[request(images=(b"x" * 100_000,))] * 4)
    disk_is_done.set()
    recorder.close()
    assert len(read_recording(tmp_path / "traffic").exchanges) == 2
    assert "disk is slower" in "".join(capfd.readouterr())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_bug_while_writing_ends_the_recording(tmp_path: Path) -> None:
    recorder = recorder_of(tmp_path / "traffic")
    await ask(recorder, FakeCore(), request())

    def fail() -> None:
        raise TypeError("a bug")

    recorder.file.submit(fail, 0)
    recorder.close()
    held = recorder.file._held_bytes
    await ask(recorder, FakeCore(), request())
    assert recorder.file.is_full and recorder.file._held_bytes == held
    assert len(read_recording(tmp_path / "traffic").exchanges) == 1


@pytest.mark.parametrize("content", [b"", b"\xc6", b"#!/bin/sh", b"\xc6\0\0\0\1x"])
def test_only_an_empty_file_or_a_recording_is_written_to(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "traffic"
    path.write_bytes(content)
    if content:
        with pytest.raises(BadSetting, match="exists, and it is not a recording"):
            start_recorder(settings(path))
        assert path.read_bytes() == content
    else:
        recorder_of(path).close()
        assert read_recording(path).exchanges == []


def test_what_cannot_be_a_recording_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", ".", "no folder/file"):
        with pytest.raises(BadSetting, match="--record"):
            start_recorder(settings(tmp_path / name))
    recorder = recorder_of(tmp_path / "traffic")
    with pytest.raises(BadSetting, match="another gateway writes"):
        start_recorder(settings(tmp_path / "traffic"))
    recorder.close()


def test_a_disk_that_is_read_only_at_the_start_does_not_stop_the_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("services.gateway.recorder.open_recording", fail)
    assert start_recorder(settings(tmp_path / "traffic")) is None
