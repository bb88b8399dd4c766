"""A group whose model computes one vector of each prompt: its steps and its messages."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from common.checkpoint import open_checkpoint
from common.events import Event, PeerDown, PeerUp
from common.messages import (
    NO_PEER,
    Abort,
    Alone,
    Cleared,
    Embeddings,
    Failed,
    ItemReceived,
    ItemRejected,
    LlmLoad,
    Noted,
    Pooled,
    Prompt,
    Reserved,
    Sampling,
    Stopping,
)
from common.wire import Tensor, encode
from compute.torch_tensors import to_wire
from services.llm.block_pool import BlockPool
from services.llm.embedding_budget import EmbeddingBudget
from services.llm.guided_decoding import GuidedDecoding
from services.llm.pooling_engine import PoolingEngine
from services.llm.pooling_model import PooledInput
from services.llm.pooling_runner import PoolingRunner
from services.llm.sampler import Sampler
from services.llm.scheduler import Scheduler
from services.llm.step_plan import StepPlan
from services.llm.worker import Worker
from tests.fakes import FakeMember, received
from tests.llm.test_vlmo import CPU, case_of, inputs_of

VQA = "vqa_base"
RETRIEVAL = "retrieval_base"
NUM_PATCHES = 16
BLOCK_SIZE = 16
SAMPLING = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)


class Group:
    """A group of one rank with a scripted member, and the sequences of a case."""

    def __init__(self, name: str, max_num_seqs: int = 8, num_items: int = 8) -> None:
        checkpoint = open_checkpoint(case_of(name).checkpoint)
        self.sequences: list[PooledInput] = [given for kind in inputs_of(name) for given in kind]
        self.task = checkpoint.family.tasks_of(checkpoint)[0]
        self.labels = checkpoint.family.labels(checkpoint)
        self.sizes_of_steps: list[int] = []
        self.poisoned_step = -1
        """The step whose first row becomes NaN."""
        self._runner = PoolingRunner(checkpoint, torch.float32, CPU)
        scheduler = Scheduler(BlockPool(64), BLOCK_SIZE, max_num_seqs, 8 * checkpoint.max_model_len)
        self.budget = EmbeddingBudget(num_items * NUM_PATCHES)
        self.engine = PoolingEngine(
            scheduler,
            self._execute,
            Sampler(),
            GuidedDecoding(lambda: None, self._runner.vocab_size, ()),  # type: ignore[arg-type]
            self._runner.input_width,
            (),
            self.budget,
            1,
            max_model_len=checkpoint.max_model_len,
            prompt_forms=checkpoint.family.prompt_forms(checkpoint),
        )
        self.member: Any = FakeMember()
        self.worker = Worker(self.member, self.engine, labels=self.labels)

    def _execute(self, plan: StepPlan, items: list[torch.Tensor]) -> torch.Tensor:
        values = self._runner.execute(plan, items).clone()
        if len(self.sizes_of_steps) == self.poisoned_step:
            values[0, 0] = torch.nan
        self.sizes_of_steps.append(len(plan.query_lens))
        return values

    def play(self, *batches: list[Event]) -> None:
        self.member.play(self.worker, *batches)
        for _, message in self.member.links.sent:
            encode(message)

    def pooled(self) -> dict[str, np.ndarray]:
        return {m.request_id: m.values.numpy() for m in self.member.links.of(Pooled)}

    def prompt(self, number: int, **changes: Any) -> Prompt:
        given = self.sequences[number]
        num_items = int(given.patches is not None)
        num_tokens = len(given.token_ids)
        ranges = [[num_tokens - NUM_PATCHES, NUM_PATCHES]] * num_items
        fields: dict[str, Any] = {
            "request_id": f"r{number}",
            "attempt": 0,
            "gateway_id": "gateway",
            "token_ids": Tensor.of(given.token_ids.numpy()),
            "positions": Tensor.of(np.arange(num_tokens)[None]),
            "rope_delta": 0,
            "placeholders": Tensor.of(np.array(ranges, np.int64).reshape(-1, 2)),
            "mm_hashes": Tensor.of(np.full((num_items, 32), number, np.uint8)),
            "sampling": SAMPLING,
            "stopping": Stopping(max_tokens=1),
            "detokenizer": NO_PEER,
            "timeout": 60.0,
            "timings": Tensor.of_text(json.dumps({"images": [{}] * num_items})),
            "whole": True,
            "task": self.task,
        }
        return Prompt(**fields | changes)

    def item(self, number: int, **changes: Any) -> Embeddings:
        patches = self.sequences[number].patches
        assert patches is not None
        fields: dict[str, Any] = {
            "request_id": f"r{number}",
            "attempt": 0,
            "item": 0,
            "mm_hash": bytes([number] * 32).hex(),
            "embeddings": to_wire(patches),
            "preprocess_id": "preprocess",
        }
        return Embeddings(**fields | changes)


def from_preprocess(*messages: Any) -> list[Event]:
    return received("preprocess", "preprocess", *messages)


def from_gateway(message: Any) -> list[Event]:
    return received("gateway", "gateway", message)


@pytest.mark.parametrize("name", [VQA, RETRIEVAL])
def test_requests_that_are_ready_share_a_step_and_get_the_references_values(name: str) -> None:
    group = Group(name)
    numbers = range(len(group.sequences))
    items = [group.item(n) for n in numbers if group.sequences[n].patches is not None]
    group.play(from_preprocess(*map(group.prompt, numbers), *items))
    assert group.sizes_of_steps == [len(group.sequences)]
    tensors = case_of(name).tensors
    expected = (
        torch.from_numpy(tensors["vqa_logits"]).softmax(1).numpy()
        if name == VQA
        else np.concatenate((tensors["text_feats"], tensors["image_feats"]))
    )
    pooled = group.pooled()
    for n in numbers:
        assert np.abs(pooled[f"r{n}"] - expected[n]).max() < 2e-4
    results = [sent for sent in group.member.links.sent if isinstance(sent[1], Pooled)]
    assert {receiver for receiver, _ in results} == {"gateway"}
    labels = results[0][1].labels
    assert (json.loads(labels.text()) if labels else []) == list(group.labels)
    assert not group.engine.holds_anything and group.budget.num_free == 8 * NUM_PATCHES


def test_a_step_has_a_bounded_number_of_requests() -> None:
    group = Group(RETRIEVAL, max_num_seqs=3)
    group.play(from_preprocess(*(group.prompt(n) for n in range(5))))
    assert group.sizes_of_steps == [3, 2] and len(group.pooled()) == 5


def test_a_request_that_waits_for_its_item_does_not_hold_up_others() -> None:
    group = Group(VQA)
    group.play(from_preprocess(group.prompt(0), group.prompt(1), group.item(1)))
    assert list(group.pooled()) == ["r1"]
    group.play(from_preprocess(group.item(0)))
    assert list(group.pooled()) == ["r1", "r0"]
    assert [m.request_id for m in group.member.links.of(ItemReceived)] == ["r1", "r0"]


def test_room_is_reserved_for_as_many_items_as_fit() -> None:
    group = Group(VQA, num_items=1)
    group.play(from_preprocess(group.prompt(0), group.prompt(1)))
    assert [m.request_id for m in group.member.links.of(Reserved)] == ["r0"]
    group.play(from_preprocess(group.item(0)))
    assert [m.request_id for m in group.member.links.of(Reserved)] == ["r0", "r1"]


@pytest.mark.parametrize(
    "end",
    [
        from_gateway(Abort(request_id="r0", attempt=0)),
        [PeerDown("gateway", "gateway", "gone")],
        [PeerDown("preprocess", "preprocess", "gone")],
    ],
    ids=["abort", "gateway", "preprocess"],
)
def test_a_request_that_nobody_waits_for_frees_everything(end: list[Event]) -> None:
    group = Group(VQA)
    group.play(from_preprocess(group.prompt(0)), end)
    assert not group.engine.holds_anything and group.budget.num_free == 8 * NUM_PATCHES
    group.play(from_preprocess(group.item(0)))
    assert not group.pooled()


def test_a_request_that_is_apart_has_a_step_to_itself_once_the_gateway_knows() -> None:
    group = Group(RETRIEVAL)
    group.play(from_preprocess(group.prompt(0, apart=True), group.prompt(1)))
    assert [m.request_id for m in group.member.links.of(Alone)] == ["r0"] and not group.pooled()
    group.play(from_gateway(Noted(request_id="r0", attempt=0)))
    assert list(group.pooled()) == ["r0"]
    group.play(from_gateway(Cleared(request_id="r0", attempt=0)))
    assert list(group.pooled()) == ["r0", "r1"]


@pytest.mark.parametrize(
    "patches", [np.zeros((15, 768), np.uint8), np.zeros((16, 768), np.float32)]
)
def test_an_item_of_another_form_is_rejected(patches: np.ndarray) -> None:
    group = Group(VQA)
    item = group.item(0, embeddings=Tensor.of(patches))
    group.play(from_preprocess(group.prompt(0), item))
    (rejected,) = group.member.links.of(ItemRejected)
    assert "uint8 (16, 768) is wanted" in rejected.reason and not group.pooled()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "generate"}, "cannot generate"),
        ({"placeholders": Tensor.of(np.array([[0, 16]]))}, "takes no prompt"),
        ({"token_ids": Tensor.of(np.arange(5))}, "positions"),
    ],
)
def test_a_prompt_without_a_result_is_refused(change: dict[str, Any], words: str) -> None:
    group = Group(VQA)
    group.play(from_preprocess(group.prompt(0, **change)))
    (failed,) = group.member.links.of(Failed)
    assert words in failed.message and not group.engine.holds_anything


def test_values_that_are_not_finite_fail_their_request_alone() -> None:
    group = Group(RETRIEVAL)
    group.poisoned_step = 0
    group.play(from_preprocess(group.prompt(0), group.prompt(1)))
    (failed,) = group.member.links.of(Failed)
    assert failed.request_id == "r0" and "not finite" in failed.message
    assert list(group.pooled()) == ["r1"]


def test_a_preprocess_learns_the_load() -> None:
    group = Group(VQA)
    group.play([PeerUp("preprocess", "preprocess")], from_preprocess(group.prompt(0)))
    loads = group.member.links.of(LlmLoad)
    assert (loads[0].waiting, loads[-1].waiting) == (0, 1)
