"""The simulated tower returns embeddings that a language model can tell apart."""

import subprocess
import sys

import numpy as np
import pytest

from common.checkpoint import open_checkpoint
from common.wire import Tensor
from services.vision.simulated import SimulatedTower, spread_of_token_embeddings
from services.vision.tower_thread import ItemShape
from tests.golden import GoldenCase

GRID = ItemShape((1, 4, 8), (0, 0))


def patches(value: int) -> Tensor:
    return Tensor.of(np.full((32, 588), value, np.uint8))


@pytest.fixture(params=["a_image", "b_two_images_tied"])
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return GoldenCase(request.param)


def test_embeddings_are_equal_for_equal_pixels_and_grids_only(case: GoldenCase) -> None:
    tower, other = (SimulatedTower(open_checkpoint(case.checkpoint), 0) for _ in range(2))
    first = tower.encode(patches(1), GRID).numpy()
    assert np.array_equal(first, other.encode(patches(1), GRID).numpy())
    assert not np.allclose(first, tower.encode(patches(2), GRID).numpy())
    assert not np.allclose(
        first.reshape(-1)[:8],
        tower.encode(patches(1), ItemShape((1, 8, 4), (0, 0))).numpy().reshape(-1)[:8],
    )


def test_embeddings_have_the_shape_and_the_spread_of_token_embeddings(case: GoldenCase) -> None:
    checkpoint = open_checkpoint(case.checkpoint)
    found = SimulatedTower(checkpoint, 0).encode(patches(3), GRID)
    assert found.shape == (8, checkpoint.text_config["hidden_size"]) and found.dtype == "float32"
    assert abs(float(found.numpy().mean())) < 1e-6
    assert float(found.numpy().std()) == pytest.approx(
        spread_of_token_embeddings(checkpoint), rel=0.15
    )


def test_no_two_of_many_images_are_alike_and_a_large_image_is_noise_too(case: GoldenCase) -> None:
    checkpoint = open_checkpoint(case.checkpoint)
    tower = SimulatedTower(checkpoint, 0)
    found = {
        tower.encode(Tensor.of(np.full((32, 588), n, np.uint8) + np.uint8(m)), GRID).bytes()
        for n in range(16)
        for m in (0, 100)
    }
    assert len(found) == 32
    large = Tensor.of(np.zeros((8192, 588), np.uint8))
    assert tower.encode(large, ItemShape((1, 64, 128), (0, 0))).numpy().std() == pytest.approx(
        spread_of_token_embeddings(checkpoint), rel=0.05
    )


def test_the_spread_is_that_of_the_weights(case: GoldenCase) -> None:
    from safetensors import safe_open

    checkpoint = open_checkpoint(case.checkpoint)
    info = checkpoint.tensors["model.embed_tokens.weight"]
    with safe_open(info.file, "pt") as file:
        expected = file.get_tensor("model.embed_tokens.weight").float().std(correction=0).item()
    assert spread_of_token_embeddings(checkpoint) == pytest.approx(expected, rel=1e-4)


def test_the_simulated_tower_imports_no_torch() -> None:
    code = (
        "import sys, services.vision.__main__, services.vision.simulated; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_with_buckets_an_image_takes_its_buckets_share_of_the_time(case: GoldenCase) -> None:
    tower = SimulatedTower(open_checkpoint(case.checkpoint), 0.4, (64, 256))
    assert [tower.seconds_of(n) for n in (4, 64, 68, 256)] == [0.1, 0.1, 0.4, 0.4]
    with pytest.raises(ValueError, match="260 patches"):
        tower.seconds_of(260)
    assert SimulatedTower(open_checkpoint(case.checkpoint), 0.4).seconds_of(5000) == 0.4
