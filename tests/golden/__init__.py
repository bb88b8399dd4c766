"""Golden cases: small random checkpoints with the float32 outputs of the reference implementation.

<case>/checkpoint/  the model directory
<case>/inputs/      messages.json, and the pictures that it names
<case>/expected/    expected.json (ids, texts, grids) and tensors.safetensors (pixel values,
                    positions, embeddings, logits)
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).parent
CASES = ("a_image", "b_two_images_tied", "c_gqa_tp8", "d_text")
CASES_WITH_IMAGES = CASES[:3]


@dataclass(frozen=True)
class GoldenCase:
    name: str

    @property
    def checkpoint(self) -> Path:
        return ROOT / self.name / "checkpoint"

    @property
    def inputs(self) -> Path:
        return ROOT / self.name / "inputs"

    @cached_property
    def expected(self) -> dict[str, Any]:
        return json.loads((ROOT / self.name / "expected" / "expected.json").read_text())

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        return load_file(ROOT / self.name / "expected" / "tensors.safetensors")


def max_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference.

    Arrays of different shapes, empty arrays and values that are not finite fail the test.
    """
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    assert actual.size, "nothing to compare"
    assert np.isfinite(actual).all() and np.isfinite(expected).all(), "not finite"
    return float(np.abs(actual - expected).max())
