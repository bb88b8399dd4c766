"""VLMo through all processes that it needs: two ranks, cut weights, and a group that is killed."""

import json
import os
import signal
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint import open_checkpoint
from services.llm.shard import write_parts
from tests.golden import GoldenCase
from tests.system.running import Running, data_uri, fetch, text_of, until

pytestmark = pytest.mark.system
CASE = GoldenCase("vqa_base", "vlmo")
NUM_ROUNDS = 4


def messages_of(question: dict[str, Any]) -> list[dict[str, Any]]:
    url = {"url": data_uri(CASE.inputs / question["image"])}
    text = {"type": "text", "text": question["question"]}
    return [{"role": "user", "content": [{"type": "image_url", "image_url": url}, text]}]


def classify(running: Running, question: dict[str, Any]) -> Any:
    """Return the label of the answer, or what was answered instead."""
    body = {"model": "vlmo", "messages": messages_of(question)}
    request = urllib.request.Request(
        running.url("/v1/classify"), json.dumps(body).encode(), {"content-type": "application/json"}
    )
    status, answer = fetch(request)
    return answer["data"][0]["label"] if status == 200 else answer


def test_two_ranks_serve_cut_weights_and_a_killed_group_loses_nothing(tmp_path: Path) -> None:
    model = tmp_path / "vlmo"
    write_parts(open_checkpoint(CASE.checkpoint), 2, model)
    questions = CASE.expected["questions"]
    answers = [question["answer"] for question in questions]
    with Running("--model", str(model), "--tp", "2", "--dtype", "float32") as running:
        roles = {member.role for member in running.members()}
        assert roles == {"controller", "gateway", "preprocess", "llm"}
        assert "needs no vision and no detokenizer" in running.twinlens("status").stdout
        refused = running.twinlens("scale", "vision", "2")
        assert refused.returncode and "needs no vision" in refused.stderr

        assert [classify(running, question) for question in questions] == answers
        verified, said = running.verify(CASE.checkpoint, "--dtype", "float32")
        assert verified == 0, said
        status, chat = running.chat(messages_of(questions[0]))
        assert status == 200 and text_of(chat) == answers[0]

        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(classify, running, q) for q in questions * NUM_ROUNDS]
            until(lambda: any(future.done() for future in asked), "a first answer")
            os.kill(running.pids()["llm"], signal.SIGKILL)
            found = [future.result() for future in asked]
        assert found == answers * NUM_ROUNDS
        running.await_idle()
