"""A golden model as on an NPU, whose operators are stand-ins."""

import numpy as np
import pytest
import torch

from common.checkpoint import open_checkpoint
from compute import ascend
from services.llm.ascend_model_runner import AscendModelRunner
from tests import npu_on_cpu
from tests.golden import GoldenCase, max_difference
from tests.llm.test_model_runner import BLOCK_SIZE, NUM_BLOCKS, Sequence, blocks_of, step

CPU = torch.device("cpu")


def found_by_two_sequences(case: GoldenCase) -> np.ndarray:
    """Return the logits of two steps: one sequence is prefilled while the other decodes."""
    runner = AscendModelRunner(
        open_checkpoint(case.checkpoint), torch.float32, CPU, NUM_BLOCKS, BLOCK_SIZE
    )
    first, second = (Sequence(case, blocks) for blocks in blocks_of(2))
    logits = [step(runner, [(first, first.num_left)])]
    first.append(case.expected["greedy_ids"][0])
    logits.append(step(runner, [(first, 1), (second, second.num_left)]))
    return np.concatenate(logits)


@pytest.mark.parametrize("name", ["a_image", "c_gqa_tp8"])
def test_two_sequences_equal_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operators = npu_on_cpu.pretend(monkeypatch)
    monkeypatch.setattr(ascend, "objection_to_attention", lambda *_: "")
    case = GoldenCase(name)
    expected = case.tensors["greedy_logits"][[0, 1, 0]]
    assert max_difference(found_by_two_sequences(case), expected) < 1e-3
    assert operators.calls.count("attend") == operators.calls.count("store") > 0


def test_blocks_are_gathered_where_its_attention_cannot_read_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operators = npu_on_cpu.pretend(monkeypatch)
    case = GoldenCase("a_image")
    expected = case.tensors["greedy_logits"][[0, 1, 0]]
    assert max_difference(found_by_two_sequences(case), expected) < 1e-3
    assert operators.calls == []
