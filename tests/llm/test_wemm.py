"""The language model of WeMM equals the reference: with rows of images in any chunks and batches,
from cached prefixes, after a preemption, and shared by ranks."""

import itertools
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.checkpoint import BadCheckpoint, open_checkpoint
from common.messages import Peer, Prompt, Sampling, Stopping
from common.sizing import Footprint
from common.vocabulary import open_vocabulary
from common.wire import Tensor as WireTensor
from compute.kernels.library import int8_kernels
from compute.linear import Linear
from compute.torch_tensors import to_wire
from services.llm.block_pool import BlockPool
from services.llm.engine import Engine
from services.llm.guided_decoding import GuidedDecoding
from services.llm.model_runner import ModelRunner
from services.llm.parallel import Shard
from services.llm.sampler import Sampler
from services.llm.scheduler import Scheduler
from tests.golden import GoldenCase, max_difference
from tests.llm.test_model_runner import BLOCK_SIZE, CPU, NUM_BLOCKS, ThreadGroup, blocks_of, step

CASE = GoldenCase("a_image", "wemm")
RENAMED = GoldenCase("a_image_renamed", "wemm")
NUM_STEPS = 32
WITH_IMAGE = 0
REQUESTS = (0, 1, 2)
END_IDS = (2, 510)
HALF_DIFFERENCE = {torch.float16: 0.05, torch.bfloat16: 0.35}
"""How far logits may lie from those of float32. About twice of what was measured."""


def prompt_of(number: int) -> tuple[np.ndarray, int]:
    """Return a request's expanded prompt, and where its image begins."""
    request = CASE.expected["requests"][number]
    ids = list(request["ids_before_image"])
    if request["image"] is None:
        return np.array(ids), len(ids)
    start, end = request["image_rows"]
    return np.array(ids + [512] * (end - start) + request["ids_after_image"]), start


def embeddings_of(number: int) -> torch.Tensor:
    image = CASE.expected["requests"][number]["image"]
    rows = CASE.tensors.get(f"visual_rows.{image}", np.zeros((0, 128), np.float32))
    return torch.from_numpy(rows)


class Sequence:
    """A golden request for `step`, with blocks that lie anywhere in the cache."""

    def __init__(self, number: int, blocks: np.ndarray) -> None:
        self.blocks = blocks
        self.num_computed = 0
        self.adapter = 0
        self.token_ids, start = prompt_of(number)
        self.embeddings = embeddings_of(number)
        self.is_image = np.zeros(len(self.token_ids), bool)
        self.is_image[start : start + len(self.embeddings)] = True
        self.greedy_ids = CASE.expected["requests"][number]["greedy_ids"]

    def append(self, token_id: int) -> None:
        self.token_ids = np.append(self.token_ids, token_id)
        self.is_image = np.append(self.is_image, False)

    @property
    def positions(self) -> np.ndarray:
        return np.arange(len(self.token_ids))[None]

    @property
    def num_left(self) -> int:
        return len(self.token_ids) - self.num_computed


def runner_of(
    dtype: torch.dtype = torch.float32,
    shard: Shard = Shard(),
    quantization: str = "none",
    path: Path = CASE.checkpoint,
) -> ModelRunner:
    checkpoint = open_checkpoint(path)
    return ModelRunner(
        checkpoint, dtype, CPU, NUM_BLOCKS, BLOCK_SIZE, shard=shard, quantization=quantization
    )


def forced_logits(runner: ModelRunner, number: int, chunk: int = 1000) -> np.ndarray:
    """Return the logits of each step, the expected tokens being fed."""
    sequence: Any = Sequence(number, blocks_of(1)[0])
    logits = np.empty((0, runner.vocab_size), np.float32)
    while not len(logits):
        logits = step(runner, [(sequence, min(chunk, sequence.num_left))])
    for token_id in sequence.greedy_ids[: NUM_STEPS - 1]:
        sequence.append(token_id)
        logits = np.concatenate((logits, step(runner, [(sequence, 1)])))
    return logits


def expected_logits(number: int) -> np.ndarray:
    return CASE.tensors[f"req{number}.greedy_logits"]


@pytest.mark.parametrize("number", REQUESTS)
@pytest.mark.parametrize("chunk", [1000, 1, 7])
def test_logits_equal_the_reference_in_any_chunks(number: int, chunk: int) -> None:
    logits = forced_logits(runner_of(), number, chunk)
    assert max_difference(logits, expected_logits(number)) < 1e-3
    assert logits.argmax(1).tolist() == CASE.expected["requests"][number]["greedy_ids"]


def test_names_without_the_infix_give_the_same() -> None:
    logits = forced_logits(runner_of(path=RENAMED.checkpoint), WITH_IMAGE)
    assert max_difference(logits, expected_logits(WITH_IMAGE)) < 1e-3


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_shares_of_all_ranks_make_the_whole_model(world_size: int) -> None:
    """There are four key heads, so eight ranks share them in pairs."""
    group = ThreadGroup(world_size)
    for logits in group.run(lambda shard: forced_logits(runner_of(shard=shard), WITH_IMAGE, 7)):
        assert max_difference(logits, expected_logits(WITH_IMAGE)) < 1e-3


def test_ranks_hold_a_share_of_the_products_and_of_their_pairs() -> None:
    model: Any = runner_of(shard=Shard(3, 4, lambda x: x, lambda x: x))._model
    layer = model.layers[0]
    shapes = {
        name: (pair.down.shape, pair.up.shape)
        for name, projection in (("qkv", layer.qkv), ("o", layer.o), ("down", layer.down))
        if (pair := projection.low_rank)
    }
    assert shapes == {
        "qkv": ((16, 128), (64, 16)),
        "o": ((16, 32), (128, 16)),
        "down": ((16, 48), (128, 16)),
    }


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_rank_reads_what_a_plan_says(world_size: int) -> None:
    runner = runner_of(shard=Shard(world_size - 1, world_size))
    footprint = Footprint(open_checkpoint(CASE.checkpoint), item_bytes=2)
    assert runner.num_bytes_read == footprint.rank_bytes(world_size)


def test_sequences_of_all_kinds_share_a_step() -> None:
    """A chunk that cuts an image, a whole prompt with an image, decodes and text only."""
    runner = runner_of()
    blocks = blocks_of(4)
    chunked, late, early, text = (
        Sequence(n, own) for n, own in zip((0, 1, 0, 2), blocks, strict=True)
    )
    found: dict[int, list[int]] = {id(s): [] for s in (chunked, late, early, text)}
    for i in itertools.count():
        work: Any = [(chunked, min(3, chunked.num_left)), (early, early.num_left)]
        work += [(text, text.num_left)] * (i >= 1) + [(late, late.num_left)] * (i >= 3)
        work = [(s, count) for s, count in work if len(found[id(s)]) < NUM_STEPS]
        if not work:
            break
        finished = [s for s, count in work if count == s.num_left]
        for s, row in zip(finished, step(runner, work), strict=True):
            found[id(s)].append(int(row.argmax()))
            s.append(found[id(s)][-1])
    assert [found[id(s)] for s in (chunked, late, early, text)] == [
        s.greedy_ids for s in (chunked, late, early, text)
    ]


@pytest.mark.parametrize("dtype", list(HALF_DIFFERENCE))
@pytest.mark.parametrize("number", REQUESTS)
def test_half_precision_is_near(dtype: torch.dtype, number: int) -> None:
    expected = expected_logits(number)
    logits = forced_logits(runner_of(dtype), number, 16)
    assert max_difference(logits, expected) < HALF_DIFFERENCE[dtype]
    best = np.sort(expected, 1)
    clear = best[:, -1] - best[:, -2] > 0.5
    assert clear.any()
    assert (logits.argmax(1) == expected.argmax(1))[clear].all()


@pytest.mark.skipif(int8_kernels() is None, reason="no AVX2, or no compiler")
def test_int8_rounds_the_products_and_not_their_pairs() -> None:
    runner = runner_of(torch.bfloat16, quantization="int8")
    model: Any = runner._model
    assert isinstance(model.layers[0].qkv.low_rank.up, Linear)
    assert max_difference(forced_logits(runner, WITH_IMAGE), expected_logits(WITH_IMAGE)) < 1.5


def test_steps_without_images_may_take_one_call() -> None:
    model: Any = runner_of()._model
    assert model.fits_fused_decode


def test_the_adapters_alpha_scales_the_pairs(tmp_path: Path) -> None:
    models: list[Any] = [
        runner_of(path=path)._model
        for path in (CASE.checkpoint, changed(tmp_path, "adapter_config.json", lora_alpha=32))
    ]
    plain, scaled = (model.layers[1] for model in models)
    for name in ("qkv", "o", "gate_up", "down"):
        ours, others = (getattr(layer, name) for layer in (scaled, plain))
        x = torch.ones(1, ours.product.shape[1])
        assert torch.allclose(ours.low_rank(x), 2 * others.low_rank(x))


class Group:
    """An engine with a real model."""

    def __init__(self, num_blocks: int = 200, chunk: int = 7, block_size: int = 4) -> None:
        checkpoint = open_checkpoint(CASE.checkpoint)
        runner = ModelRunner(checkpoint, torch.float32, CPU, num_blocks, block_size)
        self.scheduler = Scheduler(BlockPool(num_blocks), block_size, 16, chunk)
        vocabulary = partial(open_vocabulary, checkpoint)
        self.engine = Engine(
            self.scheduler,
            runner.execute,
            Sampler(),
            GuidedDecoding(vocabulary, runner.vocab_size, END_IDS),
            runner.input_width,
            END_IDS,
            num_position_components=1,
        )

    def add(self, number: int, request_id: str, **fields: Any) -> None:
        assert self.engine.add(prompt_message(number, request_id, **fields))
        if len(embeddings := embeddings_of(number)):
            key = (request_id, 0, 0)
            mm_hash = self.engine.requests[key[:2]].mm_hash(0) or ""
            assert self.engine.add_embeddings(key, mm_hash, to_wire(embeddings), {}) == ""

    def answers(self) -> dict[str, list[int]]:
        """Step until nothing is left to compute."""
        found: dict[str, list[int]] = {}
        while (outputs := self.engine.step()) is not None:
            for output in outputs:
                assert not output.error
                found.setdefault(output.request.key[0], []).extend(output.token_ids)
        return found


def prompt_message(number: int, request_id: str, **fields: Any) -> Prompt:
    token_ids, start = prompt_of(number)
    fields = {"token_ids": WireTensor.of(token_ids)} | fields
    length = len(embeddings_of(number))
    spans = np.array([[start, length]] if length else [], np.int64).reshape(-1, 2)
    return Prompt(
        request_id=request_id,
        attempt=0,
        gateway_id="gateway",
        positions=WireTensor.of(np.arange(len(token_ids))[None]),
        rope_delta=0,
        placeholders=WireTensor.of(spans),
        mm_hashes=WireTensor.of(np.full((len(spans), 32), number, np.uint8)),
        sampling=Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0),
        stopping=Stopping(max_tokens=NUM_STEPS, ignore_eos=True),
        detokenizer=Peer("detokenizer", "tcp://127.0.0.1:1"),
        timeout=60.0,
        timings=WireTensor.of_text(json.dumps({"images": [{}] * len(spans)})),
        **fields,
    )


def answer_of(number: int) -> list[int]:
    answer: list[int] = CASE.expected["requests"][number]["greedy_ids"]
    return answer


@pytest.mark.parametrize("chunk", [7, 1024])
def test_eight_requests_in_flight_answer_as_the_reference(chunk: int) -> None:
    group = Group(chunk=chunk)
    numbers = [n % 3 for n in range(8)]
    for i, number in enumerate(numbers):
        group.add(number, str(i))
    assert group.answers() == {str(i): answer_of(number) for i, number in enumerate(numbers)}


def test_preempted_requests_answer_as_the_reference() -> None:
    group = Group(num_blocks=34, chunk=16)
    for number in REQUESTS:
        group.add(number, str(number))
    assert group.answers() == {str(number): answer_of(number) for number in REQUESTS}
    assert group.scheduler.num_preemptions > 0


def test_a_cached_prefix_that_ends_inside_an_image_gives_the_same() -> None:
    """The first request has the same image and another token behind it."""
    group = Group()
    token_ids, start = prompt_of(WITH_IMAGE)
    end = start + len(embeddings_of(WITH_IMAGE))
    token_ids[end] += 1
    group.add(WITH_IMAGE, "first", token_ids=WireTensor.of(token_ids))
    assert group.answers() != {"first": answer_of(WITH_IMAGE)}
    group.add(WITH_IMAGE, "second")
    request = group.engine.requests["second", 0]
    assert group.answers() == {"second": answer_of(WITH_IMAGE)}
    assert start < (request.num_cached_tokens or 0) < end


def test_an_answer_continues_after_the_tokens_of_an_earlier_attempt() -> None:
    group = Group()
    done = answer_of(WITH_IMAGE)[:5]
    group.add(WITH_IMAGE, "r", output_token_ids=WireTensor.of(np.array(done)))
    assert group.answers() == {"r": answer_of(WITH_IMAGE)[5:]}


def changed(folder: Path, name: str, **values: Any) -> Path:
    """Copy the golden checkpoint into a folder, with other values in one of its JSON files."""
    for file in CASE.checkpoint.iterdir():
        if file.name != name:
            shutil.copy(file, folder)
    content = json.loads((CASE.checkpoint / name).read_text())
    (folder / name).write_text(json.dumps(content | values))
    return folder


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("adapter_config.json", {"r": 8}, "r in adapter_config.json is 8, .* the rank 16"),
        ("adapter_config.json", {"lora_alpha": "x"}, "lora_alpha in adapter_config.json"),
        ("lora_adapter.json", {"wemm": 3}, "lora_adapter.json must name"),
        ("config.json", {"do_image_splitting": True}, "do_image_splitting in config.json is True"),
    ],
)
def test_contradicting_files_are_refused(
    tmp_path: Path, name: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadCheckpoint, match=message):
        open_checkpoint(changed(tmp_path, name, **values))
