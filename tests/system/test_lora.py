"""LoRA adapters of a running system: from the command line and loaded at run time."""

import json
import os
import signal
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.golden import GoldenCase
from tests.lora import write_adapter
from tests.system.running import Running, fetch

pytestmark = pytest.mark.system
CASE = GoldenCase("a_image")
MESSAGES = [{"role": "user", "content": "Which words are on this page?"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("first", "second"), 1):
        write_adapter(root / name, CASE.checkpoint, seed=number)
    return root


@pytest.fixture(scope="module")
def running(root: Path) -> Iterator[Running]:
    with Running(
        "--model",
        str(CASE.checkpoint),
        "--served-model-name=base",
        "--tp=2",
        f"--lora=a={root / 'first'}",
        f"--lora-root={root}",
    ) as running:
        yield running


def ask(running: Running, model: str) -> list[int]:
    status, answer = running.chat(
        MESSAGES, model=model, max_tokens=8, return_token_ids=True, ignore_eos=True
    )
    assert status == 200, answer
    assert answer["model"] == model
    ids: list[int] = answer["choices"][0]["token_ids"]
    return ids


def stream(running: Running, model: str, on_first: Callable[[], object]) -> list[int]:
    """Return the token ids of a long streamed answer; calls `on_first` with its first token."""
    ids: list[int] = []
    for event in running.stream(
        MESSAGES, model=model, max_tokens=200, return_token_ids=True, ignore_eos=True
    ):
        assert "error" not in event, event
        for choice in event["choices"]:
            if not ids and choice.get("token_ids"):
                on_first()
            ids += choice.get("token_ids") or []
    return ids


def post(running: Running, path: str, **body: Any) -> tuple[int, Any]:
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(running.url(path), json.dumps(body).encode(), headers)
    return fetch(request)


def test_adapters_come_answer_survive_and_go(running: Running) -> None:
    base = ask(running, "base")
    first = ask(running, "a")
    assert first != base
    status, error = running.chat(MESSAGES, model="b")
    assert status == 404 and "'base', 'a'" in error["error"]["message"]

    load = {"lora_name": "b", "lora_path": "second"}
    assert post(running, "/v1/load_lora_adapter", **load)[0] == 200
    second = ask(running, "b")
    assert second not in (base, first)
    models = {model["id"]: model for model in running.get("/v1/models")[1]["data"]}
    assert list(models) == ["base", "a", "b"]
    assert (models["b"]["root"], models["b"]["parent"]) == ("second", "base")

    long = stream(running, "b", lambda: None)
    leader = min(running.members("llm"), key=lambda member: member.rank)
    assert stream(running, "b", lambda: os.kill(leader.pid, signal.SIGKILL)) == long
    assert [ask(running, name) for name in ("a", "b", "base")] == [first, second, base]

    def unload() -> None:
        assert post(running, "/v1/unload_lora_adapter", lora_name="b")[0] == 200

    assert stream(running, "b", unload) == long
    status, error = running.chat(MESSAGES, model="b")
    assert status == 404, error
    assert ask(running, "a") == first
