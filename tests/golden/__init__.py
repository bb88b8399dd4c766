"""Golden cases: small random checkpoints with the float32 outputs of the reference implementation.

<family>/<case>/checkpoint/  the model directory
<family>/<case>/inputs/      messages.json or requests.json, and the pictures that it names
<family>/<case>/expected/    expected.json (ids, texts, grids) and tensors.safetensors (pixel
                             values, positions, embeddings, logits)

The references are transformers 4.51.3 (qwen2_5_vl), the published code (qwen_vl, vlmo), and for
wemm the vision tower and base decoder of transformers 4.51.3 with an oracle for the rest.
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
CASES_WITH_ITEMS = (*CASES_WITH_IMAGES, "e_video")
ALL_CASES = (*CASES, "e_video")


@dataclass(frozen=True)
class GoldenCase:
    name: str
    family: str = "qwen2_5_vl"

    @property
    def path(self) -> Path:
        return ROOT / self.family / self.name

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def inputs(self) -> Path:
        return self.path / "inputs"

    @cached_property
    def expected(self) -> dict[str, Any]:
        return json.loads((self.path / "expected" / "expected.json").read_text())

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        return load_file(self.path / "expected" / "tensors.safetensors")

    @property
    def embeddings(self) -> np.ndarray:
        """The embeddings of all items, [num_tokens, width]; [0, 1] if there is none."""
        none = np.zeros((0, 1), np.float32)
        return self.tensors.get("image_embeds", self.tensors.get("video_embeds", none))

    @property
    def is_placeholder(self) -> np.ndarray:
        """bool [num_prompt_tokens]: whether a token stands for a part of an item."""
        config = json.loads((self.checkpoint / "config.json").read_text())
        kind = "video" if "video_embeds" in self.tensors else "image"
        is_item = np.array(self.expected["input_ids"]) == config[f"{kind}_token_id"]
        return is_item & (len(self.embeddings) > 0)


def max_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference.

    Arrays of different shapes, empty arrays and values that are not finite fail the test.
    """
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    assert actual.size, "nothing to compare"
    assert np.isfinite(actual).all() and np.isfinite(expected).all(), "not finite"
    return float(np.abs(actual - expected).max())
