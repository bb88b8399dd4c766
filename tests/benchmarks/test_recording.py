"""The calls that benchmarks/engine.py times are those that a pass makes."""

from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import passes
from benchmarks.recording import Attention, Product, products_in, recorded
from common.checkpoint import open_checkpoint
from services.llm.model_runner import ModelRunner
from services.vision import families
from services.vision.eager_tower import EagerTower
from services.vision.tower_thread import ItemShape
from tests.golden import GoldenCase

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    checkpoint = open_checkpoint(GoldenCase("a_image", "wemm").checkpoint)
    return ModelRunner(checkpoint, torch.bfloat16, CPU, 20, passes.BLOCK_SIZE)


def test_a_step_that_is_one_call_is_recorded_as_its_products(runner: ModelRunner) -> None:
    plan = passes.plan_of([1, 1], [9, 9], 1)
    calls = passes.calls_of(runner, partial(runner.execute, plan, []))
    assert calls.products == {
        Product("qkv", 2, 256, 128, "plain"): 3,
        Product("o", 2, 128, 128, "plain"): 3,
        Product("gate up", 2, 384, 128, "plain"): 3,
        Product("down", 2, 128, 192, "plain"): 3,
        Product("head", 2, 512, 128, "plain"): 1,
    }


def test_low_rank_pairs_count_in_a_prefill_with_an_item(runner: ModelRunner) -> None:
    plan = passes.plan_of([20], [20], 1, num_item_rows=6)
    run = partial(runner.execute, plan, [torch.randn(6, 128)])
    calls = passes.calls_of(runner, run)
    assert passes.has_low_rank(runner)
    # The sampled row is text, and in the last layer nothing else follows the attention.
    assert calls.products[Product("qkv low rank down", 6, 16, 128, "plain")] == 3
    assert calls.products[Product("o low rank up", 6, 128, 16, "plain")] == 2
    assert calls.products[Product("down", 20, 128, 192, "plain")] == 2
    assert calls.products[Product("down", 1, 128, 192, "plain")] == 1
    assert calls.attentions == {Attention(1, 20, 20, 8, 4, 16, True, False, False): 3}


def test_recording_leaves_the_model_as_it_was(runner: ModelRunner) -> None:
    plan = passes.plan_of([5], [5], 1)
    before = runner.execute(plan, [])
    passes.calls_of(runner, partial(runner.execute, plan, []))
    assert before.equal(runner.execute(plan, [])) and before.any()


def test_a_tower_is_recorded_whatever_its_family() -> None:
    checkpoint = open_checkpoint(GoldenCase("b_long_ntk_logn", "qwen_vl").checkpoint)
    tower = families.load(checkpoint, torch.float32, CPU)
    patches = torch.from_numpy(np.zeros((1024, 588), np.uint8))
    shape = ItemShape((1, 32, 32), (448, 448))
    calls = recorded(tower, partial(EagerTower(tower).encode, patches, shape))
    assert calls.attentions == {
        Attention(1, 1024, 1024, 3, 3, 16, False, False, False): 2,
        Attention(1, 256, 1024, 1, 1, 128, False, False, False): 1,
    }
    assert {label for label, _ in products_in(tower)} == {each.label for each in calls.products}


def test_a_model_of_one_step_is_recorded_with_the_bias_of_its_attention() -> None:
    checkpoint = open_checkpoint(GoldenCase("vqa_base", "vlmo").checkpoint)
    found = passes.of_pooling(checkpoint, torch.float32)
    assert [each.name for each in found] == [f"one step of {n} x 57 tokens" for n in (1, 4)]
    attention = next(part for part in found[1].parts if not part.is_linear)
    assert attention.name == "attention 4 x 57, 8 heads of 8 bias mask" and attention.count == 5
