"""Eager, static and graphed towers run a family that they do not know.

The toy family has its own patch size and number of patches per token, has no windows, and masks
what an item has beyond its content.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.checkpoint import Checkpoint, open_checkpoint
from common.families import FAMILIES as DESCRIPTIONS
from services.vision import graphed_tower as graphed_tower_module
from services.vision.eager_tower import EagerTower
from services.vision.families import FAMILIES, AnyTower
from services.vision.graphed_tower import GraphedTower
from services.vision.static_tower import StaticTower
from services.vision.torch_tower import make_encoder
from services.vision.tower import Encoder
from services.vision.tower_thread import ItemShape
from tests.llm.cuda_on_cpu import CPU, ReplayedPool
from tests.toy_family import tower as toy_tower
from tests.toy_family.checkpoint import PATCH, PATCHES_PER_TOKEN, WIDTH, make_checkpoint
from tests.toy_family.description import MODEL_TYPE, Toy
from tests.toy_family.plain import PlainModel
from tests.toy_family.tower import CHUNK

BUCKETS = (10, 30)
"""Two buckets that are not whole chunks."""
SHAPES = [
    ItemShape((1, 1, 3), (8, 24)),
    ItemShape((1, 2, 3), (13, 24)),
    ItemShape((1, 2, 3), (16, 17)),
    ItemShape((1, 3, 2), (24, 16)),
    ItemShape((1, 5, 6), (34, 41)),
]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """A checkpoint of the toy family, which is registered for this test."""
    monkeypatch.setitem(DESCRIPTIONS, MODEL_TYPE, Toy())
    monkeypatch.setitem(FAMILIES, MODEL_TYPE, toy_tower.load)
    monkeypatch.setattr(graphed_tower_module, "GraphPool", ReplayedPool)
    return open_checkpoint(make_checkpoint(tmp_path))


@pytest.fixture
def tower(checkpoint: Checkpoint) -> AnyTower:
    return FAMILIES[MODEL_TYPE](checkpoint, torch.float32, CPU, lambda fraction: None)


def item(shape: ItemShape, seed: int = 0) -> tuple[Tensor, ItemShape]:
    """Return random patches, in the padding too, and their shape."""
    _, rows, columns = shape.grid_thw
    random = torch.Generator().manual_seed(seed)
    size = (rows * columns, 3 * PATCH**2)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=random), shape


@pytest.fixture
def plain(checkpoint: Checkpoint) -> Callable[[Tensor, ItemShape], Tensor]:
    """Compute the embeddings in loops over patches and pixels, in float64."""
    model = PlainModel(checkpoint.path)
    return lambda patches, shape: model.embeddings(patches, shape.grid_thw[2], shape.content_size)


def is_near(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found.double(), expected, atol=1e-5)


def encoders(tower: AnyTower) -> dict[str, Encoder]:
    return {
        "eager": EagerTower(tower),
        "static": StaticTower(tower, BUCKETS),
        "graphed": GraphedTower(tower),
    }


@pytest.mark.parametrize("how", ["eager", "static", "graphed"])
def test_every_way_to_run_the_tower_equals_plain_loops(
    how: str, tower: AnyTower, plain: Callable[[Tensor, ItemShape], Tensor]
) -> None:
    """Three times each: at the third, a graph that was captured is replayed for another item."""
    encoder = encoders(tower)[how]
    for seed in range(3):
        for shape in SHAPES:
            patches, _ = item(shape, seed)
            found = encoder.encode(patches, shape)
            assert found.shape == (len(patches) // PATCHES_PER_TOKEN, WIDTH)
            assert is_near(found, plain(patches, shape))


def test_content_of_another_size_has_a_graph_of_its_own(tower: AnyTower) -> None:
    encoder = GraphedTower(tower)
    for shape in SHAPES * 2:
        encoder.encode(*item(shape))
    assert list(encoder._graphs) == SHAPES


def test_padding_behind_the_item_may_have_any_values(
    tower: AnyTower, plain: Callable[[Tensor, ItemShape], Tensor]
) -> None:
    patches, shape = item(SHAPES[1])
    length = tower.padded_length(BUCKETS[0])
    plan = tower.plan(shape, length)
    poison = torch.full((length - len(patches), tower.values_per_patch), 255, dtype=torch.uint8)
    rows = tower.forward(torch.cat((patches, poison)), plan)
    assert is_near(rows[: tower.num_tokens(shape)], plain(patches, shape))


def test_the_shapes_of_a_static_tower_depend_on_the_bucket_alone(
    tower: AnyTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    forward = tower.forward

    def watched(patches: Tensor, plan: toy_tower.EyePlan) -> Tensor:
        rows = forward(patches, plan)
        tensors = (patches, plan.content, plan.is_patch, rows)
        seen.append(tuple(len(tensor) for tensor in tensors))
        return rows

    monkeypatch.setattr(tower, "forward", watched)
    encoder = StaticTower(tower, BUCKETS)
    for shape in SHAPES:
        encoder.encode(*item(shape))
    lengths = [-(-bucket // CHUNK) * CHUNK for bucket in BUCKETS]
    small, large = ((n, n, n, n // PATCHES_PER_TOKEN) for n in lengths)
    assert seen == [small] * 4 + [large]


def test_the_table_of_families_leads_to_the_tower(checkpoint: Checkpoint) -> None:
    reported: list[float] = []
    encoder = make_encoder(checkpoint, torch.float32, CPU, reported.append, ())
    assert encoder.encode(*item(SHAPES[0])).shape == (1, WIDTH)
    assert reported[-1] == 1
