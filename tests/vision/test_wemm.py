"""The vision tower of WeMM equals the reference, for every shape and also with static shapes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.checkpoint import BadCheckpoint, open_checkpoint
from common.vision_artefact import open_artefact
from services.vision.compile import compile_vision
from services.vision.compiled_tower import CompiledTower
from services.vision.eager_tower import EagerTower
from services.vision.families.wemm import WemmVisionTower, buckets, squares_of
from services.vision.plans import tensors_of
from services.vision.static_tower import StaticTower
from services.vision.tower import Encoder
from services.vision.tower_thread import ItemShape
from tests.golden import GoldenCase, max_difference

CPU = torch.device("cpu")
CASE = GoldenCase("a_image", "wemm")
IMAGES = ("land.png", "thin.png")
SIZES = [(200, 200), (84, 200), (200, 85), (14, 14), (15, 31), (57, 113)]
"""(height, width) of images with and without incomplete patches and squares."""


def tower_of(dtype: torch.dtype = torch.float32, case: GoldenCase = CASE) -> WemmVisionTower:
    return WemmVisionTower(open_checkpoint(case.checkpoint), dtype, CPU)


def image(name: str, fill: int = 0) -> tuple[torch.Tensor, ItemShape]:
    """Return the patches of a golden image, with `fill` where it has padding."""
    facts = CASE.expected["images"][name]
    rows, columns = facts["patch_grid"]
    height, width = facts["resized_hw"]
    values = (CASE.tensors[f"pixel_values.{name}"] + 1) * 127.5
    assert max_difference(values, values.round()) < 0.5 + 1e-3
    pixels = values.round().astype(np.uint8)
    pixels[:, height:] = fill
    pixels[:, :, width:] = fill
    cells = pixels.reshape(3, rows, 14, columns, 14).transpose(1, 3, 0, 2, 4)
    patches = torch.from_numpy(np.ascontiguousarray(cells)).view(rows * columns, -1)
    return patches, ItemShape((1, rows, columns), (height, width))


def noise(height: int, width: int) -> tuple[torch.Tensor, ItemShape]:
    rows, columns = -(-height // 14), -(-width // 14)
    random = torch.Generator().manual_seed(height * 1000 + width)
    patches = torch.randint(0, 256, (rows * columns, 588), dtype=torch.uint8, generator=random)
    return patches, ItemShape((1, rows, columns), (height, width))


@pytest.mark.parametrize("case", ["a_image", "a_image_renamed"])
@pytest.mark.parametrize("name", IMAGES)
def test_embeddings_equal_the_reference(case: str, name: str) -> None:
    tower = tower_of(case=GoldenCase(case, "wemm"))
    found = EagerTower(tower).encode(*image(name)).numpy()
    assert max_difference(found, CASE.tensors[f"visual_rows.{name}"]) < 1e-4
    assert len(found) == tower.num_tokens(image(name)[1])


@pytest.mark.parametrize("name", IMAGES)
def test_positions_equal_the_reference(name: str) -> None:
    found = tower_of().plan(image(name)[1]).position_ids
    assert found.tolist() == CASE.tensors[f"vision_position_ids.{name}"].tolist()


def test_positions_count_every_part_where_patches_and_parts_agree() -> None:
    for side in (20, 70, 140):
        assert buckets(side, side).tolist() == list(range(side))


@pytest.mark.parametrize("name", IMAGES)
def test_what_stands_in_the_padding_does_not_matter(name: str) -> None:
    tower = EagerTower(tower_of())
    assert torch.equal(tower.encode(*image(name)), tower.encode(*image(name, fill=255)))


def test_squares_at_the_edge_repeat_its_patches() -> None:
    assert squares_of(3, 2, 2).tolist() == [[0, 1, 2, 3], [4, 5, 4, 5]]
    assert squares_of(1, 3, 2).tolist() == [[0, 1, 0, 1], [2, 2, 2, 2]]


@pytest.mark.parametrize("size", SIZES)
def test_static_shapes_give_the_same(size: tuple[int, int]) -> None:
    tower = tower_of()
    static = StaticTower(tower, (8, 90, 225))
    patches, shape = noise(*size)
    expected = EagerTower(tower).encode(patches, shape)
    assert max_difference(static.encode(patches, shape).numpy(), expected.numpy()) < 1e-5


def test_plans_of_one_length_have_equal_shapes() -> None:
    def shapes(size: tuple[int, int]) -> dict[str, Any]:
        plan = tower_of().plan(noise(*size)[1], 225)
        return {name: x.shape for name, x in tensors_of(plan).items()}

    assert len({str(shapes(size)) for size in SIZES}) == 1


def test_a_compiled_tower_gives_the_same(tmp_path: Path) -> None:
    out = tmp_path / "artefact"
    compile_vision(open_checkpoint(CASE.checkpoint), (225,), torch.float32, out)
    compiled: Encoder = CompiledTower(open_artefact(out), CPU)
    for name in IMAGES:
        found = compiled.encode(*image(name)).numpy()
        assert max_difference(found, CASE.tensors[f"visual_rows.{name}"]) < 1e-4


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.005), (torch.bfloat16, 0.05)])
def test_half_precision_stays_near_the_reference(dtype: torch.dtype, bound: float) -> None:
    for name in IMAGES:
        found = EagerTower(tower_of(dtype)).encode(*image(name))
        expected = CASE.tensors[f"visual_rows.{name}"]
        assert found.dtype == dtype
        assert max_difference(found.float().numpy(), expected) < bound * np.abs(expected).max()


@pytest.mark.parametrize("grid", [(2, 11, 15), (1, 11, 14), (1, 10, 15)])
def test_a_grid_that_is_not_that_of_the_content_is_refused(grid: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="is not that of a still image"):
        tower_of().plan(ItemShape(grid, (150, 200)))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("vision_config", {"hidden_act": "gelu"}, "supported is 'gelu_pytorch_tanh'"),
        ("vision_config", {"image_size": 140}, "position_embedding.weight has shape"),
        ("vision_config", {"hidden_size": None}, "hidden_size in config.json is None"),
        ("downsampler_config", {"kernel_size": 2}, "kernel_size of downsampler_config"),
        ("downsampler_config", {"stride": 0}, "stride in config.json is 0"),
        ("downsampler_config", {"bias": True}, "bias of downsampler_config"),
        ("spliter_emb_config", {"num_embeddings": 1}, "less than 2"),
    ],
)
def test_a_tower_that_is_not_supported_is_refused(
    tmp_path: Path, section: str, values: dict[str, Any], message: str
) -> None:
    shutil.copytree(CASE.checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config[section] |= values
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=message):
        WemmVisionTower(open_checkpoint(tmp_path), torch.float32, CPU)
