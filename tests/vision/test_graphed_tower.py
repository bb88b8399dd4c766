"""The graphed tower's logic on the CPU: a graph is a stand-in that computes anew at each replay."""

import pytest
import torch

from common.checkpoint import open_checkpoint
from services.vision import graphed_tower as graphed_tower_module
from services.vision.graphed_tower import GraphedVisionTower
from tests.golden import CASES_WITH_IMAGES, GoldenCase, max_difference
from tests.llm.cuda_on_cpu import CPU, ReplayedPool
from tests.vision.test_qwen2_5_vl import embed, tower_of


def graphed_tower(case: GoldenCase, monkeypatch: pytest.MonkeyPatch) -> GraphedVisionTower:
    monkeypatch.setattr(graphed_tower_module, "GraphPool", ReplayedPool)
    return GraphedVisionTower(open_checkpoint(case.checkpoint), torch.float32, CPU)


@pytest.mark.parametrize("name", CASES_WITH_IMAGES)
def test_embeddings_equal_the_reference_at_every_sight_of_a_grid(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = GoldenCase(name)
    tower = graphed_tower(case, monkeypatch)
    for _ in range(3):
        assert max_difference(embed(tower, case), case.tensors["image_embeds"]) < 1e-4


def picture(seed: int, grid: tuple[int, int, int]) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (grid[1] * grid[2], 588), dtype=torch.uint8, generator=random)


def test_a_graph_takes_another_picture_and_its_result_outlives_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = GoldenCase("a_image")
    tower = graphed_tower(case, monkeypatch)
    plain = tower_of(case)
    pictures = [(picture(seed, grid), grid) for grid in ((1, 4, 6), (1, 6, 4)) for seed in range(3)]
    found = [tower.encode(*p).numpy() for p in pictures]
    for embeddings, p in zip(found, pictures, strict=True):
        assert max_difference(embeddings, plain.encode(*p).numpy()) < 1e-5


def test_a_grid_is_captured_when_it_comes_again_and_the_oldest_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tower = graphed_tower(GoldenCase("a_image"), monkeypatch)
    grids = [(1, 2, 2 * n) for n in range(1, graphed_tower_module.MAX_GRAPHS + 2)]
    for grid in grids:
        tower.encode(picture(0, grid), grid)
    assert not tower._graphs
    for grid in grids:
        tower.encode(picture(0, grid), grid)
    assert list(tower._graphs) == grids[1:]


def test_grids_that_came_once_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_tower_module, "MAX_REMEMBERED_GRIDS", 2)
    tower = graphed_tower(GoldenCase("a_image"), monkeypatch)
    for grid in ((1, 2, 2), (1, 2, 4), (1, 2, 6), (1, 2, 2)):
        tower.encode(picture(0, grid), grid)
    assert not tower._graphs and list(tower._seen) == [(1, 2, 6), (1, 2, 2)]
