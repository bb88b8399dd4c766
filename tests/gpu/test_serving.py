"""Vision and language as processes of their own on one device."""

import json

import pytest

from tests.gpu import needs_cuda
from tests.system.running import GOLDEN, Running, golden_messages

pytestmark = [*needs_cuda, pytest.mark.system]
CASE = GOLDEN / "a_image"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_processes_share_a_device_and_answer(dtype: str) -> None:
    expected = json.loads((CASE / "expected" / "expected.json").read_text())["greedy_ids"]
    with Running(
        "--model", str(CASE / "checkpoint"), "--device", "cuda", "--dtype", dtype
    ) as system:
        body = {
            "ignore_eos": True,
            "repetition_penalty": 1.0,
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        _, answer = system.chat(golden_messages(CASE), max_tokens=len(expected), **body)
        token_ids = answer["choices"][0]["token_ids"]
        assert len(token_ids) == len(expected)
        assert dtype == "bfloat16" or token_ids == expected
