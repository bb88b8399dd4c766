"""The vision tower on CUDA equals the reference, eagerly and by graphs."""

import numpy as np
import pytest
import torch

from common.checkpoint import open_checkpoint
from services.vision.attention import TowerAttention
from services.vision.attention_choice import WAYS, choose_attention, objection_to
from services.vision.families import load
from services.vision.graphed_tower import GraphedTower
from tests.golden import CASES_WITH_ITEMS, GoldenCase, max_difference
from tests.gpu import CUDA, needs_cuda
from tests.vision.test_qwen2_5_vl import patches_of, shape_of

pytestmark = needs_cuda


def embed(tower: GraphedTower, case: GoldenCase) -> np.ndarray:
    return torch.cat([tower.encode(*picture) for picture in patches_of(case)]).float().cpu().numpy()


@pytest.mark.parametrize("name", CASES_WITH_ITEMS)
@pytest.mark.parametrize("way", [*WAYS, "chosen"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_embeddings_equal_the_reference_at_every_sight_of_a_grid(
    name: str, way: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Eagerly at the first, by a new graph at the second, by a known one at the third."""
    case = GoldenCase(name)
    loaded = load(open_checkpoint(case.checkpoint), dtype, CUDA)
    if way == "chosen":
        choose_attention(loaded)
    elif objection := objection_to(way, dtype, CUDA):
        pytest.skip(f"{way}: {objection}")
    else:
        loaded.attention = TowerAttention(WAYS[way], WAYS[way])
    tower = GraphedTower(loaded)
    expected = case.embeddings
    scale = 1 if dtype is torch.float32 else np.abs(expected).max()
    for _ in range(3):
        assert max_difference(embed(tower, case), expected) < tolerance * scale
    assert tower._graphs


def test_graphs_of_many_grids_do_not_disturb_each_other() -> None:
    """More grids than graphs are kept, and than the tower keeps plans for."""
    checkpoint = open_checkpoint(GoldenCase("a_image").checkpoint)
    tower = GraphedTower(load(checkpoint, torch.bfloat16, CUDA))
    random = torch.Generator().manual_seed(0)
    grids = [(1, 4 + 2 * (i % 3), 4 + 2 * i) for i in range(20)]
    pictures = [
        (torch.randint(0, 256, (h * w, 588), dtype=torch.uint8, generator=random), shape_of(grid))
        for grid in grids
        for _, h, w in [grid]
    ]
    eager = [tower.encode(*picture).float() for picture in pictures]
    for _ in range(2):
        for picture, expected in zip(pictures, eager, strict=True):
            assert (
                tower.encode(*picture).float() - expected
            ).abs().max() < 0.02 * expected.abs().max()
