"""Killed processes and wrong starts."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.system.running import (
    GOLDEN,
    RECEIPT,
    ROOT,
    Running,
    ask_about,
    free_port,
    lives,
    own_environment,
    processes_of,
    text_of,
    until,
)

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def system() -> Iterator[Running]:
    with Running() as running:
        yield running


def pids(system: Running) -> dict[str, int]:
    return {m["role"]: m["pid"] for m in system.members()}


@pytest.mark.parametrize("role", ["detokenizer", "llm"])
def test_a_killed_stage_alone_is_restarted(system: Running, role: str) -> None:
    before = pids(system)
    events = system.stream(ask_about(RECEIPT), max_tokens=400, ignore_eos=True)
    next(events)
    os.kill(before[role], signal.SIGKILL)
    assert not any("error" in event for event in events)
    until(lambda: system.get("/readyz")[0] == 200 and role in pids(system), f"{role} is back")
    after = pids(system)
    assert after.pop(role) != before.pop(role)
    assert after == before, "no other service was restarted"
    assert system.chat(ask_about(RECEIPT), max_tokens=2)[0] == 200


@pytest.mark.parametrize("role", ["preprocess", "vision", "controller"])
def test_a_killed_stage_that_holds_nothing_is_not_missed(system: Running, role: str) -> None:
    whole = text_of(system.chat(ask_about(RECEIPT), max_tokens=400, ignore_eos=True)[1])
    before = pids(system)
    events = system.stream(ask_about(RECEIPT), max_tokens=400, ignore_eos=True)
    first = next(events)
    os.kill(before[role], signal.SIGKILL)
    pieces = [
        e["choices"][0]["delta"].get("content") or "" for e in [first, *events] if e["choices"]
    ]
    assert "".join(pieces) == whole
    until(
        lambda: (
            system.get("/readyz")[0] == 200 and pids(system).get(role) not in (None, before[role])
        ),
        f"{role} is back",
    )
    assert system.chat(ask_about(RECEIPT), max_tokens=2)[0] == 200


def test_a_killed_gateway_comes_back_and_what_it_owned_is_freed(system: Running) -> None:
    before = pids(system)
    events = system.stream(ask_about(RECEIPT), max_tokens=3500, ignore_eos=True)
    next(events)
    os.kill(before["gateway"], signal.SIGKILL)
    with contextlib.suppress(OSError):
        list(events)
    until(lambda: reachable(system), "the gateway is back")
    until(
        lambda: all(m["in_flight"] + m["queued"] == 0 for m in system.members()), "nothing is held"
    )
    assert system.chat(ask_about(RECEIPT), max_tokens=2)[0] == 200


def reachable(system: Running) -> bool:
    try:
        return system.get("/readyz")[0] == 200
    except OSError:
        return False


def test_a_frozen_vision_replica_costs_its_requests_no_more_than_the_lease() -> None:
    with Running("--vision", "2") as system:
        expected = text_of(system.chat(ask_about(RECEIPT))[1])
        victim = system.members("vision")[0]["pid"]
        os.kill(victim, signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda _: system.chat(ask_about(RECEIPT)), range(4)))
        finally:
            os.kill(victim, signal.SIGCONT)
        assert [(status, text_of(answer)) for status, answer in answers] == [(200, expected)] * 4
        until(
            lambda: [m["state"] for m in system.members("vision")] == ["ready", "ready"],
            "the thawed one joins anew",
        )


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_nothing_is_left_when_the_launcher_ends(number: signal.Signals, status: int) -> None:
    with Running() as system:
        children = processes_of(system.process.pid)
        assert len(children) == 6
        os.kill(min(children), signal.SIGSTOP)  # a frozen child goes, too
        system.process.send_signal(number)
        assert system.process.wait(30) == status
        until(lambda: not any(map(lives, children)), "no child is left")


def serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ports = ["--http-port", str(free_port()), "--grpc-port", str(free_port())]
    command = [sys.executable, "-m", "services.cli", "serve", *ports, *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=own_environment() | environment,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/no/such/model"], "no model directory"),
        (["--model", str(ROOT / "tests")], "no config.json"),
        (["--tp", "3"], "use --tp 1, 2"),
        (["--tp", "0"], "--tp"),
        (["--device", "npu"], "torch-npu"),
        (["--max-model-len", "999999"], "4096"),
        (["--vision", "0"], "--vision"),
        (["--dtype", "int8"], "--dtype"),
        (["--read", "/no/such/file.png"], "no such file"),
        (["--kv-memory", "1000"], "--kv-memory"),
        (["--min-pixels", "9", "--max-pixels", "5"], "min_pixels"),
    ],
)
def test_a_wrong_start_says_what_is_wrong(arguments: list[str], words: str) -> None:
    ended = serve(*arguments)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_that_is_taken_is_named() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ended = serve("--grpc-port", str(taken.getsockname()[1]))
    assert ended.returncode == 2
    assert "--grpc-port" in ended.stderr


def test_a_variable_that_nothing_knows_is_refused_by_name() -> None:
    ended = serve(TWINLENS_VISOIN="2")
    assert ended.returncode == 2
    assert "TWINLENS_VISOIN" in ended.stderr


def test_a_checkpoint_without_one_of_its_shards_is_refused_by_its_name(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(GOLDEN / "b_two_images_tied" / "checkpoint", model)
    (model / "model-00002-of-00002.safetensors").unlink()
    ended = serve("--model", str(model))
    assert ended.returncode == 2
    assert "model-00002-of-00002.safetensors" in ended.stderr


def test_a_checkpoint_whose_weights_do_not_fit_its_config_ends_serve_with_the_reason(
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(GOLDEN / "a_image" / "checkpoint", model)
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(
        config.replace('"intermediate_size": 256', '"intermediate_size": 288')
    )
    ended = serve("--model", str(model))
    assert ended.returncode == 2
    assert "gate_proj" in ended.stderr


def test_simulated_vision_replicas_answer_each_picture_differently() -> None:
    from tests.preprocess.test_images import encoded, noise

    with Running(
        "--vision",
        "3",
        "--simulate-vision-ms",
        "20",
        "--model",
        str(GOLDEN / "a_image" / "checkpoint"),
    ) as system:
        pictures = [encoded(noise(56, 56, seed)) for seed in range(6)]
        body = {
            "max_tokens": 8,
            "ignore_eos": True,
            "repetition_penalty": 1.0,
            "skip_special_tokens": False,
        }
        with ThreadPoolExecutor(6) as pool:
            answers = list(
                pool.map(lambda picture: system.chat(ask_about(picture), **body), pictures)
            )
        assert [status for status, _ in answers] == [200] * 6
        assert len({text_of(answer) for _, answer in answers}) >= 5
