"""Real traffic is recorded, and a replay of it gives the same answers."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.serving import ROOT, own_environment
from common.recording import Recording, read_recording
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.commands.client import connect
from tests.system.running import RECEIPT, Running, ask_about, until

pytestmark = pytest.mark.system
KEY = "sk-a-key-that-nobody-may-see"


class Recorded:
    """A running system that records, and its recording."""

    def __init__(self, system: Running, path: Path) -> None:
        self.system = system
        self.path = path

    def read(self) -> Recording:
        return read_recording(self.path)

    def await_ends(self) -> Recording:
        """Return the recording once every request in it has ended."""
        return until(
            lambda: (found := self.read()) and all(e.answered for e in found.exchanges) and found,
            "every request has its end",
        )

    def replay(self, path: Path, *flags: str) -> tuple[int, dict[str, Any], str]:
        """Return the status, the last line as JSON, and all output."""
        command = [sys.executable, "-m", "services.cli", "replay", path, "--speed", "max"]
        command += ["--url", self.system.url("/v1")]
        command += ["--grpc", f"127.0.0.1:{self.system.grpc_port}", *flags]
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            env=own_environment() | {"OPENAI_API_KEY": KEY},
        )
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    path = tmp_path_factory.mktemp("recording") / "traffic"
    with Running("--record", str(path), "--image-formats", "gif,PNG") as system:
        yield Recorded(system, path)


@pytest.fixture(scope="module")
def first_traffic(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the recording after some requests of every kind."""
    system = recorded.system
    for _ in range(2):
        assert system.chat(ask_about(RECEIPT), max_tokens=12)[0] == 200
    text = [{"role": "user", "content": "Hello there"}]
    assert system.chat(text, max_tokens=8)[0] == 200
    assert system.chat(text, max_tokens=16, temperature=1.5, ignore_eos=True)[0] == 200
    stream = system.stream(ask_about(RECEIPT), max_tokens=400, ignore_eos=True)
    for _ in range(4):
        next(stream)
    stream.close()
    status, answer = system.chat(ask_about(b"not an image at all"))
    assert status == 400 and answer["error"]["message"].endswith("one of the formats png, gif")
    with connect(f"127.0.0.1:{system.grpc_port}") as channel:
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=range(20, 40)),
            sampling=inference_pb2.SamplingParams(temperature=0.7),
            stopping=inference_pb2.StoppingParams(max_tokens=8, ignore_eos=True),
        )
        inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)
    recorded.await_ends()
    copy = tmp_path_factory.mktemp("copy") / "traffic"
    copy.write_bytes(recorded.path.read_bytes())
    return copy


def test_the_recording_has_each_request_and_each_image_once(
    recorded: Recorded, first_traffic: Path
) -> None:
    recording = read_recording(first_traffic)
    outcomes = [e.answered.outcome for e in recording.exchanges if e.answered]
    assert outcomes[4:] == ["aborted", "UnreadableImage", "length"]
    assert set(outcomes[:4]) <= {"stop", "length"}
    assert first_traffic.read_bytes().count(RECEIPT.read_bytes()) == 1
    assert recording.num_files == 2
    seeds = [e.asked.sampling.seed for e in recording.exchanges]
    assert len(set(seeds)) == len(seeds), "the gateway draws a seed for each"


def test_a_replay_gives_the_same_answers(recorded: Recorded, first_traffic: Path) -> None:
    status, summary, output = recorded.replay(first_traffic)
    assert status == 0, output
    assert (summary["equal"], summary["failed_again"], summary["requests"]) == (6, 1, 7), output
    assert summary["ttft_p50_seconds"] > 0
    assert len(recorded.await_ends().exchanges) >= 14, "a replay is traffic, too"
    assert KEY.encode() not in recorded.path.read_bytes()


def test_an_answer_that_differs_is_named(
    recorded: Recorded, first_traffic: Path, tmp_path: Path
) -> None:
    # Other settings than those of the recording: the temperature of the sampled answer.
    whole = first_traffic.read_bytes()
    before = b"\xabtemperature\xcb" + np.array(1.5, ">f8").tobytes()
    after = b"\xabtemperature\xcb" + np.array(9.5, ">f8").tobytes()
    assert whole.count(before) == 1
    (tmp_path / "changed").write_bytes(whole.replace(before, after))
    status, summary, output = recorded.replay(tmp_path / "changed", "--out", str(tmp_path / "out"))
    assert (status, summary["differs"]) == (1, 1), output
    assert "first at token" in output
    lines = (tmp_path / "out" / "requests.jsonl").read_text().splitlines()
    [differing] = [line for line in map(json.loads, lines) if line["verdict"] == "differs"]
    assert differing["first_difference"] is not None
    assert recorded.replay(tmp_path / "changed", "--allow-differences")[0] == 0


def test_the_recorded_pace_is_kept(recorded: Recorded, first_traffic: Path) -> None:
    recording = read_recording(first_traffic)
    last = recording.exchanges[-1].arrival
    status, summary, output = recorded.replay(first_traffic, "--speed", "2")
    assert status == 0, output
    assert summary["duration_seconds"] >= last / 2
