"""The vision tower equals the reference for every grid, and its windows are those of the
definition."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoint import BadCheckpoint, open_checkpoint
from services.vision.families.qwen2_5_vl import VisionConfig, VisionTower, window_order
from tests.golden import CASES_WITH_IMAGES, GoldenCase, max_difference

CPU = torch.device("cpu")


@pytest.fixture(params=CASES_WITH_IMAGES)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return GoldenCase(request.param)


def tower_of(case: GoldenCase, dtype: torch.dtype = torch.float32) -> VisionTower:
    return VisionTower(open_checkpoint(case.checkpoint), dtype, CPU)


def patches_of(case: GoldenCase) -> list[tuple[torch.Tensor, tuple[int, int, int]]]:
    """Each picture's bytes in patch rows and its grid: the expected pixel values, neither
    normalised nor doubled in time."""
    preprocessor = open_checkpoint(case.checkpoint).preprocessor_config
    mean, std = (np.array(preprocessor[key])[:, None] for key in ("image_mean", "image_std"))
    normalised = case.tensors["pixel_values"].reshape(-1, 3, 2, 14 * 14)
    assert (normalised[:, :, 0] == normalised[:, :, 1]).all()
    values = (normalised[:, :, 0] * std + mean) * 255
    assert max_difference(values, values.round()) < 1e-3
    patches = torch.from_numpy(values.round().astype(np.uint8)).flatten(1)
    grids = [tuple(grid) for grid in case.expected["image_grid_thw"]]
    return list(zip(patches.split([int(np.prod(grid)) for grid in grids]), grids, strict=True))


def embed(tower: VisionTower, case: GoldenCase) -> np.ndarray:
    return torch.cat([tower.encode(*picture) for picture in patches_of(case)]).float().numpy()


def test_embeddings_equal_the_reference(case: GoldenCase) -> None:
    tower = tower_of(case)
    assert max_difference(embed(tower, case), case.tensors["image_embeds"]) < 1e-4
    assert tower.hidden_size == case.tensors["image_embeds"].shape[1]


def test_a_grid_seen_before_gives_the_same(case: GoldenCase) -> None:
    tower = tower_of(case)
    assert max_difference(embed(tower, case), embed(tower, case)) == 0


def test_bfloat16_stays_near_the_reference(case: GoldenCase) -> None:
    tower = tower_of(case, torch.bfloat16)
    expected = case.tensors["image_embeds"]
    assert tower.encode(*patches_of(case)[0]).dtype == tower.dtype == torch.bfloat16
    assert max_difference(embed(tower, case), expected) < 0.05 * np.abs(expected).max()


def test_loading_tells_its_progress(case: GoldenCase) -> None:
    told: list[float] = []
    VisionTower(open_checkpoint(case.checkpoint), torch.float32, CPU, told.append)
    assert told == sorted(told) and len(told) > 10 and told[-1] == 1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 4), (5, 7), (8, 8), (2, 13), (16, 9)])
def test_windows_hold_every_unit_once_and_none_crosses_a_border(height: int, width: int) -> None:
    order, windows = window_order(height, width, 4)
    assert sorted(order.tolist()) == list(range(height * width))
    assert len(windows) <= 4
    parts = order.split([units for count, units in windows for _ in range(count)])
    assert len(parts) == -(-height // 4) * -(-width // 4)
    for part in parts:
        assert len({(unit // width // 4, unit % width // 4) for unit in part.tolist()}) == 1


def checkpoint_with(tmp_path: Path, **vision: object) -> Path:
    """A copy of a golden checkpoint with other values in its vision_config; None removes a key."""
    shutil.copytree(GoldenCase("a_image").checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"] = {
        key: value for key, value in (config["vision_config"] | vision).items() if value is not None
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_sizes_that_the_3b_checkpoint_leaves_out_have_defaults(tmp_path: Path) -> None:
    path = checkpoint_with(
        tmp_path, depth=None, num_heads=None, intermediate_size=None, fullatt_block_indexes=None
    )
    config = VisionConfig.of(open_checkpoint(path))
    assert (config.depth, config.num_heads, config.intermediate_size) == (32, 16, 3420)
    assert config.fullatt_block_indexes == (7, 15, 23, 31)


def test_a_tower_that_does_not_fit_its_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="out_hidden_size"):
        VisionTower(
            open_checkpoint(checkpoint_with(tmp_path, out_hidden_size=64)), torch.float32, CPU
        )


def test_sizes_that_are_not_those_of_the_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BadCheckpoint,
        match=r"gate_proj.weight has shape \(96, 64\), config.json makes it \(97, 64\)",
    ):
        VisionTower(
            open_checkpoint(checkpoint_with(tmp_path, intermediate_size=97)), torch.float32, CPU
        )
