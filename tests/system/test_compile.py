"""A vision service that has only a compiled artefact serves a system like any other."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import free_port
from common.checkpoint import open_checkpoint
from tests.preprocess.cases import encoded, noise
from tests.system.running import (
    GOLDEN,
    READY_SECONDS,
    ROOT,
    ask_about,
    fetch,
    golden_messages,
    own_environment,
    until,
)

pytestmark = pytest.mark.system
CASE = GOLDEN / "a_image"
MODEL = f"--model={CASE / 'checkpoint'}"
BUCKETS = "64,512"
WITHOUT_DEFAULTS = {
    "ignore_eos": True,
    "repetition_penalty": 1.0,
    "skip_special_tokens": False,
    "return_token_ids": True,
}


def twinlens(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=own_environment(),
        timeout=READY_SECONDS,
    )


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artefact of the case's tower, made as a user makes it."""
    folder = tmp_path_factory.mktemp("compiled") / "artefact"
    done = twinlens("compile", MODEL, "--buckets", BUCKETS, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    assert f"wrote {folder}" in done.stdout and not done.stderr
    return folder


@contextmanager
def service(role: str, *flags: str) -> Iterator[None]:
    command = [sys.executable, "-m", f"services.{role}", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=own_environment())
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def system(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Every service alone, without a launcher; the URL of the gateway.

    The model directory of the vision service does not exist.
    """
    controller = f"--controller=unix:{tmp_path_factory.mktemp('run')}/control.sock"
    port = free_port()
    with ExitStack() as stack:

        def start(role: str, *flags: str) -> None:
            stack.enter_context(service(role, controller, *flags))

        start("controller", controller.replace("--controller", "--control-listen"))
        start("gateway", f"--http-port={port}", f"--grpc-port={free_port()}", "--drain-delay=0")
        start("preprocess", MODEL)
        start("detokenizer", MODEL)
        start("llm", MODEL, "--dtype=float32")
        start("vision", "--model=/no/such/model", f"--vision-artefact={artefact}")
        url = f"http://127.0.0.1:{port}"
        until(lambda: is_ready(url), "the gateway is ready", READY_SECONDS)
        yield url


def is_ready(url: str) -> bool:
    try:
        return fetch(urllib.request.Request(f"{url}/readyz"))[0] == 200
    except OSError:
        return False


def ask(url: str, messages: list[dict[str, Any]], max_tokens: int) -> dict[str, Any]:
    body = {
        "model": "tiny-ocr",
        "messages": messages,
        "temperature": 0,
        "max_tokens": max_tokens,
        **WITHOUT_DEFAULTS,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    status, answer = fetch(request)
    assert status == 200, answer
    return answer


def test_answers_equal_the_reference(system: str) -> None:
    expected = json.loads((CASE / "expected" / "expected.json").read_text())["greedy_ids"]
    answer = ask(system, golden_messages(CASE), len(expected))
    assert answer["choices"][0]["token_ids"] == expected
    assert not answer["timings"]["images"][0]["cached"]


def test_images_are_resized_to_the_buckets_that_it_announces(system: str) -> None:
    """784 patches would fit into the model's limits, but not into the artefact."""
    prompt = ask(system, ask_about(encoded(noise(392, 392))), 1)["prompt_token_ids"]
    placeholder = open_checkpoint(CASE / "checkpoint").config["image_token_id"]
    assert 100 < prompt.count(placeholder) <= 512 // 4


def test_wrong_use_of_compile_is_one_line() -> None:
    done = twinlens("compile", MODEL, "--buckets", "63", "--out", "new")
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert "--buckets 63" in line and "multiples of 4" in line


def test_serve_refuses_a_folder_that_is_no_artefact() -> None:
    folder = str(CASE / "checkpoint")
    done = twinlens("serve", MODEL, "--vision-artefact", folder)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert folder in line and "twinlens compile" in line
