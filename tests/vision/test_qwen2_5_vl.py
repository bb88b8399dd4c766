"""The vision tower of Qwen2.5-VL equals the reference for every grid."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoint import BadCheckpoint, open_checkpoint
from services.vision.eager_tower import EagerTower
from services.vision.families import load
from services.vision.families.qwen2_5_vl import Qwen25VisionTower, VisionConfig, mlp_padding
from services.vision.tower import Encoder
from services.vision.tower_thread import ItemShape
from tests.golden import CASES_WITH_ITEMS, GoldenCase, max_difference

CPU = torch.device("cpu")


@pytest.fixture(params=CASES_WITH_ITEMS)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return GoldenCase(request.param)


def tower_of(case: GoldenCase, dtype: torch.dtype = torch.float32) -> Qwen25VisionTower:
    return Qwen25VisionTower(open_checkpoint(case.checkpoint), dtype, CPU)


def shape_of(grid_thw: tuple[int, int, int]) -> ItemShape:
    """The shape of an image that fills its grid of 14 x 14 pixels."""
    _, height, width = grid_thw
    return ItemShape(grid_thw, (14 * height, 14 * width))


def video_shape(grid_thw: tuple[int, int, int]) -> ItemShape:
    """The shape of a video that fills its grid, two frames in a patch."""
    return replace(shape_of(grid_thw), kind="video", frames_per_patch=2)


def patches_of(case: GoldenCase) -> list[tuple[torch.Tensor, ItemShape]]:
    """Return the patches and the shape of each item: pixels from 0 to 255, one frame of images."""
    preprocessor = open_checkpoint(case.checkpoint).preprocessor_config
    mean, std = (np.array(preprocessor[key])[:, None] for key in ("image_mean", "image_std"))
    is_video = "pixel_values_videos" in case.tensors
    name = "pixel_values_videos" if is_video else "pixel_values"
    normalised = case.tensors[name].reshape(-1, 3, 2, 14 * 14)
    assert (normalised[:, :, 0] == normalised[:, :, 1]).all() != is_video
    frames = normalised if is_video else normalised[:, :, :1]
    values = (frames * std[:, None] + mean[:, None]) * 255
    assert max_difference(values, values.round()) < 1e-3
    patches = torch.from_numpy(values.round().astype(np.uint8)).flatten(1)
    grids = case.expected["video_grid_thw" if is_video else "image_grid_thw"]
    parts = patches.split([int(np.prod(grid)) for grid in grids])
    shape = video_shape if is_video else shape_of
    return [(part, shape((*grid,))) for part, grid in zip(parts, grids, strict=True)]


def embed(encoder: Encoder, case: GoldenCase) -> np.ndarray:
    """Return the embeddings of all images of the case, one after the other."""
    return torch.cat([encoder.encode(*image) for image in patches_of(case)]).float().numpy()


def test_embeddings_equal_the_reference(case: GoldenCase) -> None:
    tower = tower_of(case)
    expected = case.embeddings
    assert max_difference(embed(EagerTower(tower), case), expected) < 1e-4
    assert tower.output_width == expected.shape[1]


def test_a_grid_seen_before_gives_the_same_embeddings(case: GoldenCase) -> None:
    encoder = EagerTower(tower_of(case))
    assert max_difference(embed(encoder, case), embed(encoder, case)) == 0


def test_zeros_in_the_middle_of_an_mlp_change_nothing(
    case: GoldenCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tower_of(case)
    monkeypatch.setattr("services.vision.families.qwen2_5_vl.mlp_padding", lambda *_: 4)
    padded = tower_of(case)
    assert padded._blocks[0].down.shape[1] == plain._blocks[0].down.shape[1] + 4
    assert max_difference(embed(EagerTower(padded), case), case.embeddings) < 1e-4


def test_a_card_gets_rows_of_whole_16_bytes() -> None:
    cuda = torch.device("cuda")
    assert [mlp_padding(3420, cuda), mlp_padding(3456, cuda), mlp_padding(3420, CPU)] == [4, 0, 0]


def test_bfloat16_stays_near_the_reference(case: GoldenCase) -> None:
    tower = tower_of(case, torch.bfloat16)
    encoder = EagerTower(tower)
    expected = case.embeddings
    assert encoder.encode(*patches_of(case)[0]).dtype == tower.dtype == torch.bfloat16
    assert max_difference(embed(encoder, case), expected) < 0.05 * np.abs(expected).max()


def test_loading_reports_its_progress(case: GoldenCase) -> None:
    reported: list[float] = []
    load(open_checkpoint(case.checkpoint), torch.float32, CPU, reported.append)
    assert reported == sorted(reported) and len(reported) > 10 and reported[-1] == 1


@pytest.mark.parametrize("grid", [(2, 4, 4), (1, 3, 4), (1, 4, 3)])
def test_a_grid_that_is_not_that_of_a_still_image_is_refused(grid: tuple[int, int, int]) -> None:
    patches = torch.zeros((int(np.prod(grid)), 588), dtype=torch.uint8)
    with pytest.raises(ValueError, match="is not that of a still image"):
        EagerTower(tower_of(GoldenCase("a_image"))).encode(patches, shape_of(grid))


@pytest.mark.parametrize("grid", [(3, 4, 6), (2, 10, 14), (4, 16, 16), (1, 8, 8)])
def test_each_step_of_a_video_is_encoded_by_itself(grid: tuple[int, int, int]) -> None:
    steps, height, width = grid
    random = torch.Generator().manual_seed(0)
    size = (steps * height * width, 2 * 588)
    patches = torch.randint(0, 256, size, dtype=torch.uint8, generator=random)
    encoder = EagerTower(tower_of(GoldenCase("e_video")))
    alone = [
        encoder.encode(part, video_shape((1, height, width)))
        for part in patches.split(height * width)
    ]
    found = encoder.encode(patches, video_shape(grid))
    assert max_difference(found.numpy(), torch.cat(alone).numpy()) < 1e-4
    assert max_difference(found.numpy(), found[:1].expand_as(found).numpy()) > 1e-2


def test_a_video_of_one_picture_is_that_picture() -> None:
    tower = EagerTower(tower_of(GoldenCase("e_video")))
    random = torch.Generator().manual_seed(1)
    patches = torch.randint(0, 256, (24, 3, 1, 196), dtype=torch.uint8, generator=random)
    image = tower.encode(patches.flatten(1), shape_of((1, 4, 6)))
    video = tower.encode(patches.expand(-1, -1, 2, -1).flatten(1), video_shape((1, 4, 6)))
    assert max_difference(video.numpy(), image.numpy()) < 1e-4


@pytest.mark.parametrize(
    "patches",
    [torch.zeros((16, 588)), torch.zeros((16, 587), dtype=torch.uint8), torch.zeros((12, 588))],
    ids=["dtype", "width", "count"],
)
def test_patches_that_do_not_fit_their_grid_are_refused(patches: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"needs uint8 \(16, 588\)"):
        EagerTower(tower_of(GoldenCase("a_image"))).encode(patches, shape_of((1, 4, 4)))


def checkpoint_with(tmp_path: Path, **vision: object) -> Path:
    """Copy a golden checkpoint with other values in its vision_config. None removes a key."""
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
        load(open_checkpoint(checkpoint_with(tmp_path, out_hidden_size=64)), torch.float32, CPU)


def test_sizes_that_are_not_those_of_the_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BadCheckpoint,
        match=r"gate_proj.weight has shape \(96, 64\), config.json makes it \(97, 64\)",
    ):
        load(open_checkpoint(checkpoint_with(tmp_path, intermediate_size=97)), torch.float32, CPU)
