"""The vision tower of Qwen-VL equals the reference, at its own length and padded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.checkpoint import BadCheckpoint, open_checkpoint
from common.vision_artefact import open_artefact
from services.vision import graphed_tower as graphed_tower_module
from services.vision.compile import compile_vision
from services.vision.compiled_tower import CompiledTower
from services.vision.eager_tower import EagerTower
from services.vision.families import load
from services.vision.families.qwen_vl import QwenVisionTower, enlarged
from services.vision.graphed_tower import GraphedTower
from services.vision.static_tower import StaticTower
from services.vision.tower_thread import ItemShape
from tests.golden import GoldenCase, max_difference
from tests.llm.cuda_on_cpu import CPU, ReplayedPool

PICTURES = [
    ("a_chat_image", "demo.png"),
    ("b_long_ntk_logn", "wide.png"),
    ("c_box_two_images", "first.png"),
    ("c_box_two_images", "second.png"),
]
CASE = "b_long_ntk_logn"
SHAPE = ItemShape((1, 32, 32), (448, 448))


def tower_of(name: str, dtype: torch.dtype = torch.float32) -> QwenVisionTower:
    return QwenVisionTower(open_checkpoint(GoldenCase(name, "qwen_vl").checkpoint), dtype, CPU)


def patches_of(name: str, picture: str) -> Tensor:
    """Cut the reference's resized picture, row by row."""
    path = GoldenCase(name, "qwen_vl").path / "expected" / f"resized_448.{picture}"
    with Image.open(path) as file:
        cells = np.asarray(file).reshape(32, 14, 32, 14, 3)
    return torch.from_numpy(cells.transpose(0, 2, 4, 1, 3).reshape(1024, 588).copy())


def wanted(name: str, picture: str) -> np.ndarray:
    return GoldenCase(name, "qwen_vl").tensors[f"vision_features.{picture}"]


@pytest.mark.parametrize(("name", "picture"), PICTURES)
def test_embeddings_equal_the_reference(
    name: str, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphed_tower_module, "GraphPool", ReplayedPool)
    tower = tower_of(name)
    patches = patches_of(name, picture)
    for encoder in (
        EagerTower(tower),
        StaticTower(tower, (1024,)),
        StaticTower(tower, (1200,)),
        GraphedTower(tower),
        GraphedTower(tower),
    ):
        found = encoder.encode(patches, SHAPE).numpy()
        assert max_difference(found, wanted(name, picture)) < 1e-4


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=["bfloat16", "float16"]
)
def test_smaller_dtypes_stay_near_the_reference(dtype: torch.dtype, bound: float) -> None:
    for name, picture in PICTURES:
        expected = wanted(name, picture)
        found = EagerTower(tower_of(name, dtype)).encode(patches_of(name, picture), SHAPE)
        assert found.dtype == dtype
        assert max_difference(found.float().numpy(), expected) < bound * np.abs(expected).max()


def test_a_compiled_tower_equals_the_reference(tmp_path: Path) -> None:
    name, picture = PICTURES[2]
    checkpoint = open_checkpoint(GoldenCase(name, "qwen_vl").checkpoint)
    compile_vision(checkpoint, (1200,), torch.float32, tmp_path / "out")
    encoder = CompiledTower(open_artefact(tmp_path / "out"), CPU)
    found = encoder.encode(patches_of(name, picture), SHAPE).numpy()
    assert max_difference(found, wanted(name, picture)) < 1e-4


def test_loading_reports_its_progress() -> None:
    reported: list[float] = []
    load(
        open_checkpoint(GoldenCase(CASE, "qwen_vl").checkpoint),
        torch.float32,
        CPU,
        reported.append,
    )
    assert reported == sorted(reported) and len(reported) > 10 and reported[-1] == 1


def test_an_image_of_another_size_is_refused() -> None:
    patches = torch.zeros((256, 588), dtype=torch.uint8)
    with pytest.raises(ValueError, match="an image has 32 x 32 patches"):
        EagerTower(tower_of(CASE)).encode(patches, ItemShape((1, 16, 16), (224, 224)))


def test_a_table_of_the_same_side_stays_as_it_is() -> None:
    table = torch.randn(256, 6)
    assert enlarged(table, 16) is table
    assert enlarged(table, 32).shape == (1024, 6)


@pytest.mark.parametrize(
    ("visual", "message"),
    [
        ({"output_dim": 64}, "not the language model's hidden_size"),
        ({"heads": 5}, "not a multiple of its heads"),
        ({"mlp_ratio": 3.0}, "config.json makes it"),
        ({"width": None}, "no width in visual"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    tmp_path: Path, visual: dict[str, object], message: str
) -> None:
    shutil.copytree(GoldenCase(CASE, "qwen_vl").checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    values = config["visual"] | visual
    config["visual"] = {key: value for key, value in values.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=message):
        load(open_checkpoint(tmp_path), torch.float32, CPU)
