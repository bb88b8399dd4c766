"""What a wrong start says, and what is left of a system whose launcher has ended."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loopback import free_port
from tests.system.running import GOLDEN, ROOT, Running, lives, own_environment, processes_of, until

pytestmark = pytest.mark.system
NUM_SERVICES = 6


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_no_process_is_left_when_the_launcher_ends(number: signal.Signals, status: int) -> None:
    with Running("--simulate-vision-ms", "1") as system:
        children = processes_of(system.process.pid)
        assert len(children) == NUM_SERVICES
        os.kill(min(children), signal.SIGSTOP)  # a frozen child ends, too
        system.process.send_signal(number)
        assert system.process.wait(30) == status
        until(lambda: not any(map(lives, children)), "no child is left")


def serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `twinlens serve` until it ends by itself."""
    ports = ["--http-port", str(free_port()), "--grpc-port", str(free_port())]
    return subprocess.run(
        [sys.executable, "-m", "services.cli", "serve", *ports, *arguments],
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
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ended = serve("--grpc-port", str(taken.getsockname()[1]))
    assert ended.returncode == 2
    assert "--grpc-port" in ended.stderr


def test_an_unknown_variable_is_refused_by_name() -> None:
    ended = serve(TWINLENS_VISOIN="2")
    assert ended.returncode == 2
    assert "TWINLENS_VISOIN" in ended.stderr


def test_a_checkpoint_without_one_of_its_shards_is_refused_by_the_name_of_the_shard(
    tmp_path: Path,
) -> None:
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
