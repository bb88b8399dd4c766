"""VLMo's model equals its reference, alone, in mixed batches and cut for two and more ranks."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.checkpoint import Checkpoint, open_checkpoint
from services.llm import families
from services.llm.parallel import Shard
from services.llm.pooling_model import PooledInput, PoolingModel
from services.preprocess import families as preprocess_families
from services.preprocess.preprocessor import Preprocessor
from tests.golden import GoldenCase, max_difference

CPU = torch.device("cpu")
VQA = ("vqa_base", "vqa_base_plus")


def case_of(name: str) -> GoldenCase:
    return GoldenCase(name, "vlmo")


def model_of(name: str, dtype: torch.dtype = torch.float32) -> PoolingModel:
    return families.load_pooling(open_checkpoint(case_of(name).checkpoint), dtype, CPU)


def inputs_of(name: str) -> tuple[list[PooledInput], list[PooledInput], list[PooledInput]]:
    """Return the texts, the images, and the pairs of a case, prepared as preprocess does it."""
    case = case_of(name)
    checkpoint = open_checkpoint(case.checkpoint)
    preprocessor = Preprocessor(checkpoint, preprocess_families.load(checkpoint))
    pictures = {
        path.name: preprocessor.prepare_item("image", path.read_bytes())
        for path in sorted(case.inputs.glob("*.png"))
    }

    def given(text: str | None, picture: str | None) -> PooledInput:
        content: list[dict[str, str]] = [{"type": "text", "text": text}] if text else []
        content += [{"type": "image"}] if picture else []
        items = [pictures[picture]] if picture else []
        ids = preprocessor.encode(preprocessor.render([{"role": "user", "content": content}]))
        expanded = preprocessor.expand(ids, items)
        patches = torch.from_numpy(items[0].patches()) if items else None
        return PooledInput(torch.from_numpy(expanded.token_ids), patches)

    if name not in VQA:
        texts = [given(text, None) for text in case.expected["texts"]]
        return texts, [given(None, picture) for picture in pictures], []
    questions = case.expected["questions"]
    return [], [], [given(q["question"], q["image"]) for q in questions]


@torch.inference_mode()
def pool(model: PoolingModel, inputs: list[PooledInput]) -> Tensor:
    return model.pool(inputs)


@pytest.mark.parametrize("name", VQA)
def test_answers_are_the_references(name: str) -> None:
    *_, pairs = inputs_of(name)
    case = case_of(name)
    found = pool(model_of(name), pairs)
    wanted = torch.from_numpy(case.tensors["vqa_logits"]).softmax(-1)
    assert max_difference(found.numpy(), wanted.numpy()) < 1e-5
    labels = open_checkpoint(case.checkpoint).family.labels(open_checkpoint(case.checkpoint))
    questions = case.expected["questions"]
    assert [labels[i] for i in found.argmax(-1)] == [q["answer"] for q in questions]


def test_texts_and_images_become_the_references_vectors() -> None:
    texts, images, _ = inputs_of("retrieval_base")
    case = case_of("retrieval_base")
    found = pool(model_of("retrieval_base"), [*texts, *images])
    wanted = np.concatenate([case.tensors["text_feats"], case.tensors["image_feats"]])
    assert max_difference(found.numpy(), wanted) < 1e-5
    scores = found[len(texts) :] @ found[: len(texts)].T
    assert (-scores).argsort(-1).tolist() == case.expected["ranking_text_for_image"]
    assert (-scores.T).argsort(-1).tolist() == case.expected["ranking_image_for_text"]


def test_a_text_is_cut_and_padded_as_the_reference_does_it() -> None:
    texts, *_ = inputs_of("retrieval_base")
    found = torch.stack([given.token_ids for given in texts])
    assert found.tolist() == case_of("retrieval_base").tensors["text_ids"].tolist()


def test_a_mixed_batch_equals_each_prompt_alone() -> None:
    texts, images, _ = inputs_of("retrieval_base")
    model = model_of("retrieval_base")
    mixed = [texts[0], images[0], texts[1], images[1], *texts[2:], images[2]]
    together = pool(model, mixed)
    alone = torch.cat([pool(model, [given]) for given in mixed])
    assert max_difference(together.numpy(), alone.numpy()) < 1e-5


@pytest.mark.parametrize("name", [*VQA, "retrieval_base"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_equal_one(name: str, world_size: int) -> None:
    inputs = [given for kind in inputs_of(name) for given in kind]
    alone = pool(model_of(name), inputs)
    checkpoint = open_checkpoint(case_of(name).checkpoint)
    for found in on_ranks(checkpoint, world_size, lambda model: pool(model, inputs)):
        assert max_difference(found.numpy(), alone.numpy()) < 1e-5


def on_ranks(
    checkpoint: Checkpoint, world_size: int, run: Callable[[PoolingModel], Tensor]
) -> list[Tensor]:
    """Run something on every rank, each in a thread of its own."""
    barrier = threading.Barrier(world_size)
    parts: list[Any] = [None] * world_size
    found: list[Any] = [None] * world_size

    def all_reduce(rank: int, part: Tensor) -> Tensor:
        parts[rank] = part.clone()
        barrier.wait()
        total = torch.stack(parts).sum(0)
        barrier.wait()
        return total

    def work(rank: int) -> None:
        shard = Shard(rank, world_size, lambda part: all_reduce(rank, part))
        model = families.load_pooling(checkpoint, torch.float32, CPU, shard)
        found[rank] = run(model)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VQA)
def test_half_precision_is_near(name: str, dtype: torch.dtype) -> None:
    """The bound is the one of the published adaptation for float16."""
    *_, pairs = inputs_of(name)
    found = pool(model_of(name, dtype), pairs)
    wanted = torch.from_numpy(case_of(name).tensors["vqa_logits"]).softmax(-1)
    assert max_difference(found.numpy(), wanted.numpy()) < 0.02
