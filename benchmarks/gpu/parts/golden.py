"""Every family's golden cases in float32 on the card: logits and embeddings are the references'.

The helpers of the tests on the CPU make the requests and read the references; here their models
are on the card.
"""

import dataclasses
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.gpu.part import Task
from benchmarks.gpu.setup import Setup
from common.checkpoint import open_checkpoint
from services.llm import families
from services.llm.attention_backends.by_triton import ByTriton
from services.llm.attention_backends.protocol import PagedBackend
from services.llm.cuda_model_runner import CudaModelRunner
from services.llm.step_plan import StepPlan
from services.vision.families import load
from services.vision.graphed_tower import GraphedTower
from services.vision.tower_thread import ItemShape
from tests.golden import ALL_CASES, CASES_WITH_ITEMS, GoldenCase, max_difference
from tests.golden.qwen_vl_requests import REQUESTS, golden_request
from tests.llm import test_model_runner, test_qwen_vl, test_vlmo, test_wemm
from tests.vision import test_qwen2_5_vl
from tests.vision import test_qwen_vl as vision_of_qwen_vl
from tests.vision import test_wemm as vision_of_wemm

TABLE = "Golden cases in float32"
LOGITS_BOUND = 1e-3
EMBEDDINGS_BOUND = 1e-4
POOLED_BOUND = 1e-5
MAX_NUM_SEQS = 2
SIGHTS = 3
"""A picture is encoded eagerly, then by a new graph, then by a known one."""

Comparison = tuple[str, str, np.ndarray, np.ndarray, float]
"""The family, what is compared, what was found and is expected, and the bound."""


class Fetching(CudaModelRunner):
    """A runner whose logits come to the host."""

    attention: type[PagedBackend] | None = ByTriton

    def __init__(self, *given: Any, **named: Any) -> None:
        named |= {"max_num_seqs": MAX_NUM_SEQS, "attention": self.attention}
        super().__init__(*given, **named)

    def execute(self, plan: StepPlan, embeddings: list[Tensor]) -> Tensor:
        return super().execute(plan, embeddings).cpu()


def run(task: Task) -> None:
    limit = 1 if task.dry_run else None
    with Setup(task) as setup, pytest.MonkeyPatch.context() as patch:
        if task.dry_run:  # whole prompts take Triton's interpreter too long
            patch.setattr(Fetching, "attention", None)
        for module in (test_model_runner, test_wemm, test_qwen_vl):
            patch.setattr(module, "CPU", setup.device)
            patch.setattr(module, "ModelRunner", Fetching)
            patch.setattr(module, "BLOCK_SIZE", ByTriton.block_size)
        for compare in (
            qwen2_5_vl,
            vision_of_qwen2_5_vl,
            qwen_vl,
            vision_of_qwen,
            wemm,
            vision_wemm,
            vlmo,
        ):
            with task.attempt(TABLE, family=compare.__name__):
                for comparison in islice(compare(setup.device), limit):
                    write(task, *comparison)


def write(
    task: Task, family: str, case: str, found: np.ndarray, expected: np.ndarray, bound: float
) -> None:
    difference = max_difference(found, expected)
    has_choices = bound == LOGITS_BOUND
    same = bool((found.argmax(-1) == expected.argmax(-1)).all()) if has_choices else None
    task.row(
        TABLE,
        family=family,
        case=case,
        values=found.size,
        greatest_difference=difference,
        bound=bound,
        same_tokens=same,
        ok=difference < bound and same is not False,
    )


def qwen2_5_vl(device: torch.device) -> Iterator[Comparison]:
    for name in ALL_CASES:
        case = GoldenCase(name)
        for chunk in (1000, 7):
            logits = test_model_runner.forced_logits(test_model_runner.runner_of(case), case, chunk)
            what = f"{name}, chunks of {chunk}"
            yield "qwen2_5_vl", what, logits, case.tensors["greedy_logits"], LOGITS_BOUND


def wemm(device: torch.device) -> Iterator[Comparison]:
    for number in test_wemm.REQUESTS:
        logits = test_wemm.forced_logits(test_wemm.runner_of(), number)
        expected = test_wemm.expected_logits(number)
        yield "wemm", f"request {number}", logits, expected, LOGITS_BOUND


def qwen_vl(device: torch.device) -> Iterator[Comparison]:
    for name, number in REQUESTS:
        golden = golden_request(name, number)
        logits = test_qwen_vl.forced_logits(golden, chunk=2000)
        yield "qwen", f"{name}, request {number}", logits, golden.logits, LOGITS_BOUND


@torch.inference_mode()
def vlmo(device: torch.device) -> Iterator[Comparison]:
    for name in (*test_vlmo.VQA, "retrieval_base"):
        case = test_vlmo.case_of(name)
        model = families.load_pooling(open_checkpoint(case.checkpoint), torch.float32, device)
        texts, images, pairs = test_vlmo.inputs_of(name)
        given = [moved(each, device) for each in (*texts, *images, *pairs)]
        found = model.pool(given).cpu().numpy()
        if pairs:
            expected = torch.from_numpy(case.tensors["vqa_logits"]).softmax(-1).numpy()
        else:
            expected = np.concatenate([case.tensors["text_feats"], case.tensors["image_feats"]])
        yield "vlmo", name, found, expected, POOLED_BOUND


def moved(given: Any, device: torch.device) -> Any:
    tensors = {
        each.name: value.to(device)
        for each in dataclasses.fields(given)
        if (value := getattr(given, each.name)) is not None
    }
    return dataclasses.replace(given, **tensors)


def tower_of(case: GoldenCase, device: torch.device) -> GraphedTower[Any]:
    return GraphedTower(load(open_checkpoint(case.checkpoint), torch.float32, device))


def sights(
    tower: GraphedTower[Any], pictures: list[tuple[Tensor, ItemShape]]
) -> Iterator[tuple[int, np.ndarray]]:
    for sight in range(1, SIGHTS + 1):
        yield sight, torch.cat([tower.encode(*picture) for picture in pictures]).cpu().numpy()


def vision_of_qwen2_5_vl(device: torch.device) -> Iterator[Comparison]:
    for name in CASES_WITH_ITEMS:
        case = GoldenCase(name)
        pictures = test_qwen2_5_vl.patches_of(case)
        for sight, found in sights(tower_of(case, device), pictures):
            what = f"vision of {name}, sight {sight}"
            yield "qwen2_5_vl", what, found, case.embeddings, EMBEDDINGS_BOUND


def vision_of_qwen(device: torch.device) -> Iterator[Comparison]:
    for name, picture in vision_of_qwen_vl.PICTURES:
        given = (vision_of_qwen_vl.patches_of(name, picture), vision_of_qwen_vl.SHAPE)
        expected = vision_of_qwen_vl.wanted(name, picture)
        for sight, found in sights(tower_of(GoldenCase(name, "qwen_vl"), device), [given]):
            what = f"vision of {name}, {picture}, sight {sight}"
            yield "qwen", what, found, expected, EMBEDDINGS_BOUND


def vision_wemm(device: torch.device) -> Iterator[Comparison]:
    for name in vision_of_wemm.IMAGES:
        expected = vision_of_wemm.CASE.tensors[f"visual_rows.{name}"]
        tower = tower_of(vision_of_wemm.CASE, device)
        for sight, found in sights(tower, [vision_of_wemm.image(name)]):
            yield "wemm", f"vision of {name}, sight {sight}", found, expected, EMBEDDINGS_BOUND
