"""A whole language model computes with these kernels what the reference computed."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from compute.triton_kernels import interpreted
from tests.golden import GoldenCase, max_difference
from tests.kernels import HAS_CARD
from tests.llm.test_model_runner import Sequence, blocks_of, runner_of, step

NUM_STEPS = 3
CHUNK = 5


@pytest.mark.skipif(HAS_CARD, reason="tests/gpu has this test on the card")
def test_a_chunk_and_decodes_equal_the_reference() -> None:
    """The interpreter is slow, so torch computes the beginning of the prompt."""
    case = GoldenCase("c_gqa_tp8")
    runner = runner_of(case, torch.float32)
    sequence = Sequence(case, blocks_of(1)[0])
    step(runner, [(sequence, sequence.num_left - CHUNK)])
    with interpreted():
        logits = [step(runner, [(sequence, CHUNK)])]
        for token_id in case.expected["greedy_ids"][: NUM_STEPS - 1]:
            sequence.append(token_id)
            logits.append(step(runner, [(sequence, 1)]))
    expected = case.tensors["greedy_logits"][:NUM_STEPS]
    assert max_difference(np.concatenate(logits), expected) < 1e-3
