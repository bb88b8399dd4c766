"""The tower with static shapes: what it pads, masks and drops changes no embedding, and no shape
depends on the image."""

from functools import cache

import numpy as np
import pytest
import torch

from common.checkpoint import open_checkpoint
from services.vision.families.qwen2_5_vl import VisionTower
from services.vision.static_tower import StaticVisionTower
from services.vision.torch_tower import make_tower
from tests.golden import CASES_WITH_IMAGES, GoldenCase, max_difference
from tests.vision.test_qwen2_5_vl import CPU, embed, patches_of

NAME = CASES_WITH_IMAGES[0]
BUCKETS = (64, 256, 1024)
GRIDS = [(2, 2), (2, 30), (18, 6), (8, 8), (16, 16), (34, 22), (10, 26), (32, 32)]


@cache
def towers(name: str, buckets: tuple[int, ...] = BUCKETS) -> tuple[VisionTower, StaticVisionTower]:
    """Without and with buckets."""
    checkpoint = open_checkpoint(GoldenCase(name).checkpoint)
    return VisionTower(checkpoint, torch.float32, CPU), StaticVisionTower(
        checkpoint, torch.float32, CPU, buckets
    )


def noise(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(height * width).integers(
            0, 256, (height * width, 588), dtype=np.uint8
        )
    )


@pytest.mark.parametrize("name", CASES_WITH_IMAGES)
def test_golden_embeddings_equal_the_reference(name: str) -> None:
    _, tower = towers(name)
    case = GoldenCase(name)
    assert max_difference(embed(tower, case), case.tensors["image_embeds"]) < 1e-4


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize("buckets", [BUCKETS, (1000, 2048)], ids=str)
def test_every_grid_gives_what_it_gives_without_padding(
    height: int, width: int, buckets: tuple[int, ...]
) -> None:
    patches = noise(height, width)
    grid = (1, height, width)
    plain, padded = (tower.encode(patches, grid) for tower in towers(NAME, buckets))
    assert padded.shape == plain.shape
    assert max_difference(padded.numpy(), plain.numpy()) < 1e-4


def test_what_stands_in_the_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison where an image ends would be seen wherever a mask is missing."""
    _, tower = towers(NAME)
    patches, grid = patches_of(GoldenCase(NAME))[0]
    clean = tower.encode(patches, grid)
    embed_patches = tower._embed_patches

    def poisoned(padded: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        x = embed_patches(padded, order)
        x[len(patches) :] = 1000.0
        return x

    monkeypatch.setattr(tower, "_embed_patches", poisoned)
    assert max_difference(tower.encode(patches, grid).numpy(), clean.numpy()) < 1e-5


def test_shapes_depend_on_the_bucket_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape that enters an attention is the same for all grids of a bucket."""
    _, tower = towers(NAME)
    attend = torch.nn.functional.scaled_dot_product_attention

    def shapes_of(height: int, width: int) -> set[tuple[int, ...]]:
        shapes: set[tuple[int, ...]] = set()

        def seen(*tensors: torch.Tensor) -> torch.Tensor:
            shapes.update(tuple(tensor.shape) for tensor in tensors)
            return attend(*tensors)

        monkeypatch.setattr("services.vision.static_tower.F.scaled_dot_product_attention", seen)
        tower.encode(noise(height, width), (1, height, width))
        return shapes

    assert shapes_of(2, 34) == shapes_of(16, 16) == shapes_of(10, 22)
    assert shapes_of(2, 34) != shapes_of(18, 16)


def test_an_image_that_fits_into_no_bucket_is_refused() -> None:
    with pytest.raises(ValueError, match="1028 patches fit into none"):
        towers(NAME)[1].encode(noise(2, 514), (1, 2, 514))


def test_the_vision_tower_of_a_cpu_is_static_where_there_are_buckets() -> None:
    checkpoint = open_checkpoint(GoldenCase(NAME).checkpoint)
    made = make_tower(checkpoint, torch.float32, CPU, lambda _: None, BUCKETS)
    assert isinstance(made, StaticVisionTower) and made.buckets == BUCKETS
    assert type(make_tower(checkpoint, torch.float32, CPU, lambda _: None, ())) is VisionTower
