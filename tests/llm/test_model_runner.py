"""The language model equals the reference, however its batches are cut and its blocks lie."""

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from common.checkpoint import open_checkpoint
from compute.kernels.library import bfloat16_kernels, int8_kernels
from compute.linear import Linear
from compute.quantization import quantize
from services.llm import families
from services.llm.batch import Batch
from services.llm.decoder import Decoder
from services.llm.fused_decode import FusedDecode
from services.llm.language_model import LanguageModel
from services.llm.model_runner import ModelRunner
from services.llm.parallel import Shard
from services.llm.step_plan import StepPlan
from tests.golden import ALL_CASES, GoldenCase, max_difference

CPU = torch.device("cpu")
BLOCK_SIZE = 8
NUM_BLOCKS = 96
NUM_STEPS = 32
# How far the logits of transformers 5.23.0 in bfloat16 lie from its own in float32 (the same ids
# being fed).
BFLOAT16_DIFFERENCE = {
    "a_image": 0.50,
    "b_two_images_tied": 0.98,
    "c_gqa_tp8": 0.22,
    "d_text": 0.42,
    "e_video": 0.54,  # with the positions of 4.51.3
}


class Sequence:
    """A golden request: its tokens with their positions and embeddings, and blocks that lie
    anywhere in the cache."""

    def __init__(self, case: GoldenCase, blocks: np.ndarray, adapter: int = 0) -> None:
        self.blocks = blocks
        self.adapter = adapter
        self.num_computed = 0
        self.token_ids = np.array(case.expected["input_ids"], np.int64)
        self.positions = case.tensors["position_ids"]
        self.delta = case.expected["rope_delta"]
        self.embeddings = torch.from_numpy(case.embeddings)
        self.is_image = case.is_placeholder

    def append(self, token_id: int) -> None:
        position = np.full((3, 1), len(self.token_ids) + self.delta)
        self.token_ids = np.append(self.token_ids, token_id)
        self.positions = np.concatenate((self.positions, position), 1)
        self.is_image = np.append(self.is_image, False)

    @property
    def num_left(self) -> int:
        return len(self.token_ids) - self.num_computed


def blocks_of(num_sequences: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).permutation(NUM_BLOCKS).reshape(num_sequences, -1))


def step(runner: ModelRunner, work: list[tuple[Sequence, int]]) -> np.ndarray:
    """Compute that many tokens of each sequence; the logits of those that have none left, in
    order."""
    spans = [np.arange(s.num_computed, s.num_computed + count) for s, count in work]
    starts = np.cumsum([0] + [count for _, count in work])
    is_image = [s.is_image[span] for (s, _), span in zip(work, spans, strict=True)]
    plan = StepPlan(
        # A placeholder's id is irrelevant: one that no vocabulary knows must do.
        token_ids=np.concatenate(
            [
                np.where(image, 10**9, s.token_ids[span])
                for (s, _), span, image in zip(work, spans, is_image, strict=True)
            ]
        ),
        positions=np.concatenate(
            [s.positions[:, span] for (s, _), span in zip(work, spans, strict=True)], 1
        ),
        slot_mapping=np.concatenate(
            [
                s.blocks[span // BLOCK_SIZE] * BLOCK_SIZE + span % BLOCK_SIZE
                for (s, _), span in zip(work, spans, strict=True)
            ]
        ),
        query_lens=np.array([count for _, count in work]),
        context_lens=np.array([span[-1] + 1 for span in spans]),
        block_tables=padded(
            [
                s.blocks[: -(-(span[-1] + 1) // BLOCK_SIZE)]
                for (s, _), span in zip(work, spans, strict=True)
            ]
        ),
        item_rows=np.flatnonzero(np.concatenate(is_image)),
        sampled_rows=np.array(
            [
                stop - 1
                for (s, count), stop in zip(work, starts[1:], strict=True)
                if count == s.num_left
            ],
            np.int64,
        ),
        rope_parameters=np.zeros(len(work), np.int64),
        adapters=np.array([s.adapter for s, _ in work], np.int64),
    )
    embeddings = []
    for (s, count), span, image in zip(work, spans, is_image, strict=True):
        if image.any():
            first = s.is_image[: span[0]].sum()
            embeddings.append(s.embeddings[first : first + image.sum()])
        s.num_computed += count
    return runner.execute(plan, embeddings).numpy()


def padded(tables: list[np.ndarray]) -> np.ndarray:
    longest = max(map(len, tables))
    return np.stack([np.pad(table, (0, longest - len(table))) for table in tables])


def runner_of(
    case: GoldenCase,
    dtype: torch.dtype = torch.float32,
    shard: Shard = Shard(),
    quantization: str = "auto",
) -> ModelRunner:
    return ModelRunner(
        open_checkpoint(case.checkpoint),
        dtype,
        CPU,
        NUM_BLOCKS,
        BLOCK_SIZE,
        shard=shard,
        quantization=quantization,
    )


def forced_logits(
    runner: ModelRunner, case: GoldenCase, chunk: int, adapter: int = 0
) -> np.ndarray:
    """Logits of the last prompt token and of every greedy token but the last, the expected ones
    being fed."""
    sequence = Sequence(case, blocks_of(1)[0], adapter)
    logits = np.empty((0, runner.vocab_size), np.float32)
    while not len(logits):
        logits = step(runner, [(sequence, min(chunk, sequence.num_left))])
    for token_id in case.expected["greedy_ids"][: NUM_STEPS - 1]:
        sequence.append(token_id)
        logits = np.concatenate((logits, step(runner, [(sequence, 1)])))
    return logits


@pytest.fixture(params=ALL_CASES)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return GoldenCase(request.param)


@pytest.mark.parametrize("chunk", [1000, 1, 7, 16, 33])
def test_logits_equal_the_reference_in_any_chunks(case: GoldenCase, chunk: int) -> None:
    logits = forced_logits(runner_of(case), case, chunk)
    assert max_difference(logits[0], case.tensors["prefill_logits_last"]) < 1e-3
    assert max_difference(logits, case.tensors["greedy_logits"]) < 1e-3
    assert logits.argmax(1).tolist() == case.expected["greedy_ids"]


def test_sequences_of_all_kinds_share_a_step(case: GoldenCase) -> None:
    runner = runner_of(case)
    early, late, chunked = (Sequence(case, blocks) for blocks in blocks_of(3))
    greedy_ids = {id(s): [] for s in (early, late, chunked)}
    for i in itertools.count():
        work = [(chunked, min(3, chunked.num_left)), (early, early.num_left)] + [
            (late, late.num_left)
        ] * (i >= 3)
        work = [(s, count) for s, count in work if len(greedy_ids[id(s)]) < NUM_STEPS]
        if not work:
            break
        finished = [s for s, count in work if count == s.num_left]
        for s, row in zip(finished, step(runner, work), strict=True):
            greedy_ids[id(s)].append(int(row.argmax()))
            s.append(greedy_ids[id(s)][-1])
    assert list(greedy_ids.values()) == [case.expected["greedy_ids"]] * 3


def test_a_step_that_samples_nothing_returns_no_rows(case: GoldenCase) -> None:
    runner = runner_of(case)
    assert step(runner, [(Sequence(case, blocks_of(1)[0]), 5)]).shape == (0, runner.vocab_size)


def test_logits_of_every_prompt_position_equal_the_reference() -> None:
    case = GoldenCase("a_image")
    runner = runner_of(case)
    sequence = Sequence(case, blocks_of(1)[0])
    length = len(sequence.token_ids)
    sequence.token_ids = sequence.token_ids[:0]
    rows = []
    for i in range(length):
        sequence.token_ids = np.array(case.expected["input_ids"][: i + 1])
        rows.append(step(runner, [(sequence, 1)]))
    assert max_difference(np.concatenate(rows), case.tensors["prefill_logits_all"]) < 1e-3


@pytest.mark.parametrize("first", [1, 4, 7, 8, 9])
def test_what_a_block_held_before_does_not_reach_its_next_owner(first: int) -> None:
    """Beside a longer one a sequence is padded: its last block's empty rest is read, and masked."""
    case = GoldenCase("d_text")
    runner = runner_of(case)
    runner._kv_cache.fill_(torch.nan)
    short, long = (Sequence(case, blocks) for blocks in blocks_of(2))
    step(runner, [(short, first), (long, 60)])
    for _ in range(12):
        short.token_ids = short.token_ids[: short.num_computed + 1]
        assert np.isfinite(step(runner, [(short, 1), (long, 1)])).all()
        short.token_ids = np.array(case.expected["input_ids"])


def test_bfloat16_is_as_near_to_float32_as_the_reference_is(case: GoldenCase) -> None:
    logits = forced_logits(runner_of(case, torch.bfloat16), case, 16)
    expected = case.tensors["greedy_logits"]
    assert max_difference(logits, expected) < 1.2 * BFLOAT16_DIFFERENCE[case.name]
    best = np.sort(expected, 1)
    clear = best[:, -1] - best[:, -2] > 0.5
    assert clear.any()
    assert (logits.argmax(1) == expected.argmax(1))[clear].all()


def test_float16_is_near_to_float32_behind_a_video() -> None:
    case = GoldenCase("e_video")
    logits = forced_logits(runner_of(case, torch.float16), case, 16)
    assert max_difference(logits, case.tensors["greedy_logits"]) < 0.05
    assert logits.argmax(1).tolist() == case.expected["greedy_ids"]


@pytest.mark.skipif(int8_kernels() is None, reason="no AVX2, or no compiler")
def test_int8_computes_with_the_weights_that_its_bytes_mean(
    case: GoldenCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dequantised(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        quantized, scales = quantize(weight.bfloat16())
        return Linear(quantized.float() * scales[:, None], bias)

    found, exact = (
        forced_logits(runner_of(case, torch.bfloat16, quantization=q), case, 16)
        for q in ("int8", "none")
    )
    monkeypatch.setattr("compute.products.Int8Linear", dequantised)
    meant = forced_logits(runner_of(case, torch.float32, quantization="int8"), case, 16)
    assert max_difference(found, meant) < 1.2 * BFLOAT16_DIFFERENCE[case.name]
    assert max_difference(found, exact) > 0


@pytest.mark.skipif(bfloat16_kernels() is None, reason="no kernels for this CPU, or no compiler")
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize(
    ("name", "scales"), [("a_image", False), ("c_gqa_tp8", False), ("c_gqa_tp8", True)]
)
def test_decodes_in_one_call_give_what_single_operations_give(
    name: str, scales: bool, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if scales:
        scale_queries(monkeypatch)
    case = GoldenCase(name)
    fused = runner_of(case, torch.bfloat16, quantization=quantization)
    assert fused._fused_decode is not None
    runs = count_calls(monkeypatch, fused._fused_decode)
    monkeypatch.setattr(FusedDecode, "of", lambda *given: None)
    single = runner_of(case, torch.bfloat16, quantization=quantization)
    before = torch.get_num_threads()
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        try:
            found, expected = (
                decoded_beside_each_other(runner, case) for runner in (fused, single)
            )
        finally:
            torch.set_num_threads(before)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))
    assert runs == 2 * [1, 2, 3, 3, 3, 2, 1]


@pytest.mark.skipif(bfloat16_kernels() is None, reason="no kernels for this CPU, or no compiler")
def test_a_context_that_is_divided_gives_the_same_in_one_call() -> None:
    runner = runner_of(GoldenCase("c_gqa_tp8"), torch.bfloat16)
    runner._kv_cache.normal_(generator=torch.Generator().manual_seed(0))
    tables = np.zeros((2, 88), np.int64)
    tables[0] = np.arange(88)
    tables[1, :5] = np.arange(88, 93)
    slots = np.array([87 * BLOCK_SIZE + 3, 92 * BLOCK_SIZE + 7])
    contexts = np.array([700, 40])
    ones = np.ones(2, np.int64)
    plan = StepPlan(
        np.array([5, 6]),
        np.tile(contexts - 1, (3, 1)),
        slots,
        ones,
        contexts,
        tables,
        np.zeros(0, np.int64),
        np.arange(2),
        rope_parameters=np.zeros(2, np.int64),
        adapters=np.zeros(2, np.int64),
    )
    fused = runner.execute(plan, [])
    assert runner._fused_decode is not None
    runner._fused_decode = None
    assert fused.equal(runner.execute(plan, []))


def scale_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on loaded models scale their queries, as models with logn attention do."""
    load = families.load

    def load_scaled(*given: Any) -> LanguageModel:
        model = load(*given)
        assert isinstance(model, Decoder)
        return replace(model, query_scale=lambda batch: 1 + 0.1 * batch.positions[0].float())

    monkeypatch.setattr(families, "load", load_scaled)


def count_calls(monkeypatch: pytest.MonkeyPatch, fused_decode: FusedDecode) -> list[int]:
    """Becomes the number of rows of every call."""
    runs: list[int] = []
    run = fused_decode.run

    def counted(plan: StepPlan, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        runs.append(len(x))
        return run(plan, x, batch)

    monkeypatch.setattr(fused_decode, "run", counted)
    return runs


def decoded_beside_each_other(runner: ModelRunner, case: GoldenCase) -> list[np.ndarray]:
    """The logits of each step of three sequences that begin and end one after another, each with
    five tokens after its prompt."""
    waiting = [Sequence(case, blocks) for blocks in blocks_of(3)]
    running = []
    found = []
    length = len(case.expected["input_ids"])
    while waiting or running:
        if waiting:
            running.append(waiting.pop())
            found.append(step(runner, [(running[-1], running[-1].num_left)]))
            running[-1].append(case.expected["greedy_ids"][0])
        found.append(step(runner, [(sequence, 1) for sequence in running]))
        for sequence, row in zip(running, found[-1], strict=True):
            sequence.append(int(row.argmax()))
        running = [sequence for sequence in running if len(sequence.token_ids) <= length + 5]
    return found


class ThreadGroup:
    """Ranks as threads: a reduction waits for all and adds what they brought in the order of
    ranks."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.parts: list[torch.Tensor] = [torch.empty(0)] * world_size

    def shard(self, rank: int) -> Shard:
        def exchange(
            part: torch.Tensor, join: Callable[[list[torch.Tensor]], torch.Tensor]
        ) -> torch.Tensor:
            self.parts[rank] = part
            self.barrier.wait()
            joined = join(self.parts)
            self.barrier.wait()
            return joined

        def all_reduce(partial: torch.Tensor) -> torch.Tensor:
            return exchange(partial, lambda parts: torch.stack(parts).sum(0))

        def all_gather(part: torch.Tensor) -> torch.Tensor:
            return exchange(part, lambda parts: torch.cat(parts, -1))

        return Shard(rank, len(self.parts), all_reduce, all_gather)

    def run(self, run: Callable[[Shard], np.ndarray]) -> list[np.ndarray]:
        """What each rank's call gives."""
        found: list[np.ndarray] = [np.empty(0)] * len(self.parts)

        def run_rank(rank: int) -> None:
            found[rank] = run(self.shard(rank))

        threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(len(found))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_shares_of_all_ranks_make_the_whole_model(world_size: int) -> None:
    case = GoldenCase("c_gqa_tp8")
    for logits in ThreadGroup(world_size).run(
        lambda shard: forced_logits(runner_of(case, shard=shard), case, 33)
    ):
        assert max_difference(logits, case.tensors["greedy_logits"]) < 1e-3


@pytest.mark.skipif(bfloat16_kernels() is None, reason="no kernels for this CPU, or no compiler")
@pytest.mark.parametrize(("world_size", "scales"), [(2, True), (8, False)])
def test_ranks_decode_in_calls_of_half_a_layer(
    world_size: int, scales: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if scales:
        scale_queries(monkeypatch)
    case = GoldenCase("c_gqa_tp8")

    is_fused: list[bool] = []

    def logits_of(shard: Shard) -> np.ndarray:
        runner = runner_of(case, torch.bfloat16, shard)
        is_fused.append(runner._fused_decode is not None)
        return forced_logits(runner, case, 33)

    fused = ThreadGroup(world_size).run(logits_of)
    monkeypatch.setattr(FusedDecode, "of", lambda *given: None)
    single = ThreadGroup(world_size).run(logits_of)
    assert len({logits.tobytes() for logits in fused + single}) == 1
    assert is_fused == world_size * [True] + world_size * [False]


def test_kv_bytes_are_those_of_the_cache(case: GoldenCase) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        size = ModelRunner.kv_bytes_per_block(open_checkpoint(case.checkpoint), dtype, BLOCK_SIZE)
        assert size * NUM_BLOCKS == runner_of(case, dtype)._kv_cache.nbytes
