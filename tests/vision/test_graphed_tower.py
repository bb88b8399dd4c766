"""The logic of graphs on the CPU: a stand-in for a graph computes again at each replay."""

import pytest
import torch

from common.checkpoint import open_checkpoint
from services.vision import graphed_tower as graphed_tower_module
from services.vision import torch_tower
from services.vision.eager_tower import EagerTower
from services.vision.graphed_tower import GraphedTower
from services.vision.sample_shapes import SMALL_PATCHES
from services.vision.static_tower import StaticTower
from services.vision.tower_thread import ItemShape
from tests.golden import CASES_WITH_ITEMS, GoldenCase, max_difference
from tests.llm.cuda_on_cpu import ReplayedPool
from tests.vision.test_qwen2_5_vl import embed, shape_of, tower_of


@pytest.fixture(autouse=True)
def _graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_tower_module, "GraphPool", ReplayedPool)


@pytest.mark.parametrize("name", CASES_WITH_ITEMS)
def test_embeddings_equal_the_reference_each_time_a_grid_comes(name: str) -> None:
    case = GoldenCase(name)
    encoder = GraphedTower(tower_of(case))
    for _ in range(3):
        assert max_difference(embed(encoder, case), case.embeddings) < 1e-4


def image(seed: int, grid: tuple[int, int, int]) -> tuple[torch.Tensor, ItemShape]:
    random = torch.Generator().manual_seed(seed)
    size = (grid[1] * grid[2], 588)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=random), shape_of(grid)


def test_a_graph_takes_another_image_and_its_result_outlives_the_next_replay() -> None:
    tower = tower_of(GoldenCase("a_image"))
    graphed = GraphedTower(tower)
    eager = EagerTower(tower)
    images = [image(seed, grid) for grid in ((1, 4, 6), (1, 6, 4)) for seed in range(3)]
    found = [graphed.encode(*each).numpy() for each in images]
    for embeddings, each in zip(found, images, strict=True):
        assert max_difference(embeddings, eager.encode(*each).numpy()) < 1e-5


def test_a_shape_is_captured_when_it_comes_again_and_the_oldest_graph_is_dropped() -> None:
    encoder = GraphedTower(tower_of(GoldenCase("a_image")))
    grids = [(1, 2, 2 * n) for n in range(1, graphed_tower_module.MAX_GRAPHS + 2)]
    for grid in grids:
        encoder.encode(*image(0, grid))
    assert not encoder._graphs
    for grid in grids:
        encoder.encode(*image(0, grid))
    assert list(encoder._graphs) == [shape_of(grid) for grid in grids[1:]]


def test_shapes_that_came_once_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_tower_module, "MAX_REMEMBERED_SHAPES", 2)
    encoder = GraphedTower(tower_of(GoldenCase("a_image")))
    for grid in ((1, 2, 2), (1, 2, 4), (1, 2, 6), (1, 2, 2)):
        encoder.encode(*image(0, grid))
    assert not encoder._graphs
    assert list(encoder._seen) == [shape_of((1, 2, 6)), shape_of((1, 2, 2))]


@pytest.mark.parametrize("buckets", [(), (16, 64)])
def test_a_tower_on_cuda_encodes_a_small_image_before_it_is_ready(
    buckets: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = GoldenCase("a_image")
    tower = tower_of(case)
    lengths: list[int] = []
    forward = tower.forward
    monkeypatch.setattr(
        tower,
        "forward",
        lambda patches, plan: (lengths.append(len(patches)), forward(patches, plan))[1],
    )
    monkeypatch.setattr(torch_tower, "load", lambda *given: tower)
    monkeypatch.setattr(torch_tower, "choose_attention", lambda tower: None)
    reported: list[float] = []
    encoder = torch_tower.make_encoder(
        open_checkpoint(case.checkpoint),
        torch.float32,
        torch.device("cuda"),
        reported.append,
        buckets,
    )
    assert type(encoder) is (StaticTower if buckets else GraphedTower)
    assert len(lengths) == 1 and lengths[0] <= SMALL_PATCHES and reported[-1:] == [1.0]
