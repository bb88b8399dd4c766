"""Padding, masking and dropping changes no embedding, and no shape depends on the image."""

from functools import cache

import numpy as np
import pytest
import torch

from common.checkpoint import open_checkpoint
from services.vision.eager_tower import EagerTower
from services.vision.families.qwen2_5_vl import Qwen25VisionTower
from services.vision.static_tower import StaticTower
from services.vision.torch_tower import make_encoder
from services.vision.tower_thread import ItemShape
from tests.golden import CASES_WITH_ITEMS, GoldenCase, max_difference
from tests.vision.test_qwen2_5_vl import CPU, embed, patches_of, shape_of, tower_of, video_shape

NAME = CASES_WITH_ITEMS[0]
BUCKETS = (64, 256, 1024)
GRIDS = [(2, 2), (2, 30), (18, 6), (8, 8), (16, 16), (34, 22), (10, 26), (32, 32)]


@cache
def tower(name: str = NAME) -> Qwen25VisionTower:
    return tower_of(GoldenCase(name))


def noise(height: int, width: int) -> tuple[torch.Tensor, ItemShape]:
    """Return the patches and the shape of an image of random pixels."""
    random = np.random.default_rng(height * width)
    patches = random.integers(0, 256, (height * width, 588), dtype=np.uint8)
    return torch.from_numpy(patches), shape_of((1, height, width))


@pytest.mark.parametrize("name", CASES_WITH_ITEMS)
def test_golden_embeddings_equal_the_reference(name: str) -> None:
    case = GoldenCase(name)
    encoder = StaticTower(tower(name), BUCKETS)
    assert max_difference(embed(encoder, case), case.embeddings) < 1e-4


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize("buckets", [BUCKETS, (1000, 2048)], ids=str)
def test_every_grid_has_the_embeddings_that_it_has_without_padding(
    height: int, width: int, buckets: tuple[int, ...]
) -> None:
    image = noise(height, width)
    plain = EagerTower(tower()).encode(*image)
    padded = StaticTower(tower(), buckets).encode(*image)
    assert padded.shape == plain.shape
    assert max_difference(padded.numpy(), plain.numpy()) < 1e-4


@pytest.mark.parametrize("grid", [(2, 4, 6), (3, 10, 14), (7, 8, 8)])
def test_a_video_has_the_embeddings_that_it_has_without_padding(
    grid: tuple[int, int, int],
) -> None:
    random = np.random.default_rng(0)
    size = (int(np.prod(grid)), 2 * 588)
    patches = torch.from_numpy(random.integers(0, 256, size, dtype=np.uint8))
    plain = EagerTower(tower()).encode(patches, video_shape(grid))
    padded = StaticTower(tower(), BUCKETS).encode(patches, video_shape(grid))
    assert max_difference(padded.numpy(), plain.numpy()) < 1e-4


@pytest.mark.parametrize("name", [NAME, "e_video"])
def test_what_stands_in_the_padding_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Poison behind the item would be seen wherever a mask is missing."""
    encoder = StaticTower(tower(), BUCKETS)
    patches, shape = patches_of(GoldenCase(name))[0]
    clean = encoder.encode(patches, shape)
    embed_patches = tower()._embed_patches

    def poisoned(padded: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        x = embed_patches(padded, order)
        x[len(patches) :] = 1000.0
        return x

    monkeypatch.setattr(tower(), "_embed_patches", poisoned)
    assert max_difference(encoder.encode(patches, shape).numpy(), clean.numpy()) < 1e-5


def test_shapes_depend_on_the_bucket_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape that enters an attention is the same for all grids of a bucket."""
    encoder = StaticTower(tower(), BUCKETS)
    attend = torch.nn.functional.scaled_dot_product_attention

    def shapes_of(height: int, width: int) -> set[tuple[int, ...]]:
        shapes: set[tuple[int, ...]] = set()

        def seen(*tensors: torch.Tensor) -> torch.Tensor:
            shapes.update(tuple(tensor.shape) for tensor in tensors)
            return attend(*tensors)

        monkeypatch.setattr("services.vision.windows.F.scaled_dot_product_attention", seen)
        encoder.encode(*noise(height, width))
        return shapes

    assert shapes_of(2, 34) == shapes_of(16, 16) == shapes_of(10, 22) != set()
    assert shapes_of(2, 34) != shapes_of(18, 16)


def test_an_image_that_fits_into_no_bucket_is_refused() -> None:
    with pytest.raises(ValueError, match="1028 patches fit into none"):
        StaticTower(tower(), BUCKETS).encode(*noise(2, 514))


def test_the_vision_tower_of_a_cpu_is_static_if_there_are_buckets() -> None:
    checkpoint = open_checkpoint(GoldenCase(NAME).checkpoint)
    made = make_encoder(checkpoint, torch.float32, CPU, lambda _: None, BUCKETS)
    assert isinstance(made, StaticTower) and made.buckets == BUCKETS
    assert type(make_encoder(checkpoint, torch.float32, CPU, lambda _: None, ())) is EagerTower
