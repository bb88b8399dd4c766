"""A golden model as on a card: mixed steps, and decodes by a graph with all of our kernels.

Graphs are stand-ins, the kernels run under Triton's interpreter.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from common.checkpoint import open_checkpoint
from compute.triton_kernels import interpreted
from services.llm import cuda_model_runner, warm_up
from services.llm.attention_backends.by_triton import ByTriton
from services.llm.cuda_model_runner import CudaModelRunner
from tests.golden import GoldenCase, max_difference
from tests.kernels import HAS_CARD
from tests.llm import test_model_runner
from tests.llm.cuda_on_cpu import CPU, pretend
from tests.llm.test_model_runner import Sequence, blocks_of, step

NUM_BLOCKS = 12
BLOCK_SIZE = 64


@pytest.mark.skipif(HAS_CARD, reason="tests/gpu has this test on the card")
def test_two_sequences_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is prefilled while the other decodes; then both decode in one graph of three.

    Only attention is ours until then, which is quicker.
    """
    pretend(monkeypatch)
    case = GoldenCase("a_image")
    monkeypatch.setattr(test_model_runner, "BLOCK_SIZE", BLOCK_SIZE)
    monkeypatch.setattr(test_model_runner, "NUM_BLOCKS", NUM_BLOCKS)
    monkeypatch.setattr(cuda_model_runner, "captured_sizes", lambda most: [most])
    monkeypatch.setattr(warm_up, "STEPS", ((1, 8),))
    runner = CudaModelRunner(
        open_checkpoint(case.checkpoint),
        torch.float32,
        CPU,
        NUM_BLOCKS,
        BLOCK_SIZE,
        max_num_seqs=3,
        attention=ByTriton,
    )
    token_ids = case.expected["greedy_ids"]
    first, second = (Sequence(case, blocks) for blocks in blocks_of(2))
    found = [step(runner, [(first, first.num_left)])]
    first.append(token_ids[0])
    found.append(step(runner, [(first, 1), (second, second.num_left)]))
    first.append(token_ids[1])
    second.append(token_ids[0])
    with interpreted():
        found.append(step(runner, [(first, 1), (second, 1)]))
    expected = case.tensors["greedy_logits"][[0, 1, 0, 2, 1]]
    assert max_difference(np.concatenate(found), expected) < 1e-3
