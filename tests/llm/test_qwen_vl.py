"""The language model of Qwen-VL equals the reference, however its steps are cut.

Case b has prompts below, across and far above the context of the training: three values of alpha.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.checkpoint import BadCheckpoint, Checkpoint, open_checkpoint
from common.lora import open_adapter
from common.messages import Peer, Prompt, Sampling, Stopping
from common.vocabulary import open_vocabulary
from common.wire import Tensor as WireTensor
from compute.kernels.library import int8_kernels
from services.llm import families
from services.llm.block_pool import BlockPool
from services.llm.engine import Engine
from services.llm.guided_decoding import GuidedDecoding
from services.llm.lora_registry import Resident
from services.llm.model_runner import ModelRunner
from services.llm.parallel import Shard
from services.llm.sampler import SampledTokens, Sampler
from services.llm.scheduler import Scheduler
from services.llm.step_plan import StepPlan
from tests.golden import max_difference
from tests.golden.qwen_vl_requests import CASES, REQUESTS, GoldenRequest, requests_of
from tests.golden.qwen_vl_requests import golden_request as request_of
from tests.llm.test_model_runner import ThreadGroup
from tests.lora import merge, write_adapter

CPU = torch.device("cpu")
BLOCK_SIZE = 16
LONG = "b_long_ntk_logn"


class Forced(Sampler):
    """Draws the tokens that the reference drew."""

    def __init__(self, answer: list[int]) -> None:
        super().__init__()
        self._answer = answer

    def sample(self, logits: Tensor, keys: Any, positions: list[int], masks: Any) -> SampledTokens:
        drawn = super().sample(logits, keys, positions, masks)
        drawn.token_ids[:] = [self._answer[position] for position in positions]
        return drawn


class Group:
    """An engine with the model of a case. It keeps the logits of each step."""

    def __init__(
        self,
        name: str,
        dtype: torch.dtype = torch.float32,
        shard: Shard = Shard(),
        quantization: str = "none",
        num_blocks: int = 400,
        chunk: int = 256,
        sampler: Sampler | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        checkpoint = checkpoint or open_checkpoint(request_of(name, 0).case.checkpoint)
        self.loaded: list[float] = []
        self.runner = ModelRunner(
            checkpoint,
            dtype,
            CPU,
            num_blocks,
            BLOCK_SIZE,
            self.loaded.append,
            shard=shard,
            quantization=quantization,
        )
        self.scheduler = Scheduler(BlockPool(num_blocks), BLOCK_SIZE, 16, chunk)
        self.engine = Engine(
            self.scheduler,
            self._execute,
            sampler or Sampler(),
            GuidedDecoding(partial(open_vocabulary, checkpoint), self.runner.vocab_size, ()),
            self.runner.input_width,
            checkpoint.eos_token_ids,
            num_position_components=1,
        )
        self.logits: list[Tensor] = []

    def _execute(self, plan: StepPlan, embeddings: list[Tensor]) -> Tensor:
        logits = self.runner.execute(plan, embeddings)
        self.logits.append(logits)
        return logits

    def add(
        self, golden: GoldenRequest, request_id: str, num_delivered: int = 0, adapter: str = ""
    ) -> None:
        prompt = prompt_of(golden, request_id, num_delivered)
        prompt.adapter = adapter
        assert self.engine.add(prompt)
        request = self.engine.requests[request_id, 0]
        for item, embeddings in enumerate(golden.embeddings):
            key = (request_id, 0, item)
            mm_hash = request.mm_hash(item) or ""
            assert self.engine.add_embeddings(key, mm_hash, WireTensor.of(embeddings), {}) == ""

    def answers(self) -> dict[str, list[int]]:
        """Step until nothing is left to compute."""
        found: dict[str, list[int]] = {}
        while (outputs := self.engine.step()) is not None:
            for output in outputs:
                assert not output.error
                found.setdefault(output.request.key[0], []).extend(output.token_ids)
        return found


def prompt_of(golden: GoldenRequest, request_id: str, num_delivered: int = 0) -> Prompt:
    """Return the prompt, as a later attempt if tokens were delivered already."""
    ids = golden.token_ids
    hashes = [list(name.encode().ljust(32)) for name in golden.pictures]
    return Prompt(
        request_id=request_id,
        attempt=0,
        gateway_id="gateway",
        token_ids=WireTensor.of(ids),
        positions=WireTensor.of(np.arange(len(ids))[None]),
        rope_delta=0,
        placeholders=WireTensor.of(np.array(golden.spans, np.int64).reshape(-1, 2)),
        mm_hashes=WireTensor.of(np.array(hashes, np.uint8).reshape(-1, 32)),
        sampling=Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0),
        stopping=Stopping(max_tokens=len(golden.answer), ignore_eos=True),
        detokenizer=Peer("detokenizer", "tcp://127.0.0.1:1"),
        timeout=60.0,
        timings=WireTensor.of_text(f'{{"images": [{", ".join(["{}"] * len(hashes))}]}}'),
        rope_parameter=golden.alpha,
        cache_salt=bytes([golden.alpha]),
        output_token_ids=WireTensor.of(np.array(golden.answer[:num_delivered], np.int64))
        if num_delivered
        else None,
    )


def forced_logits(golden: GoldenRequest, **settings: Any) -> np.ndarray:
    """Return the logits of every step, float32 [num answer tokens, vocab_size]."""
    group = Group(golden.case.name, sampler=Forced(golden.answer), **settings)
    group.add(golden, "r")
    assert group.answers() == {"r": golden.answer}
    return torch.cat(group.logits).float().numpy()


def check_logits(golden: GoldenRequest, logits: np.ndarray) -> None:
    first = golden.case.tensors[f"req{golden.number}.prefill_logits_last"]
    assert max_difference(logits[0], first) < 1e-3
    assert max_difference(logits, golden.logits) < 1e-3
    assert logits.argmax(1).tolist() == golden.answer


@pytest.mark.parametrize(("name", "number"), REQUESTS)
def test_logits_equal_the_reference(name: str, number: int) -> None:
    golden = request_of(name, number)
    check_logits(golden, forced_logits(golden, chunk=2000))


def test_logits_equal_the_reference_in_chunks_of_seven_tokens() -> None:
    golden = request_of(LONG, 2)
    check_logits(golden, forced_logits(golden, chunk=7))


@pytest.mark.parametrize("name", CASES)
def test_requests_in_flight_together_keep_their_own_alpha(name: str) -> None:
    group = Group(name, chunk=48)
    asked = (requests_of(name) * 4)[:8]
    for i, golden in enumerate(asked):
        group.add(golden, str(i))
    assert group.answers() == {str(i): golden.answer for i, golden in enumerate(asked)}


def test_preempted_requests_equal_the_reference() -> None:
    group = Group(LONG, num_blocks=70)
    for golden in requests_of(LONG):
        group.add(golden, str(golden.number))
    answers = group.answers()
    assert group.scheduler.num_preemptions > 0
    assert answers == {str(golden.number): golden.answer for golden in requests_of(LONG)}


def test_a_cached_prefix_gives_the_same() -> None:
    group = Group(LONG)
    golden = request_of(LONG, 2)
    for request_id in ("0", "1"):
        group.add(golden, request_id)
        request = group.engine.requests[request_id, 0]
        assert group.answers() == {request_id: golden.answer}
    assert (request.num_cached_tokens or 0) > 1000


def test_prompts_of_another_alpha_share_no_prefix() -> None:
    group = Group(LONG)
    for number in (1, 2, 1):
        golden = request_of(LONG, number)
        group.engine._ended.clear()
        group.add(golden, str(number))
        request = group.engine.requests[str(number), 0]
        assert group.answers() == {str(number): golden.answer}
        if number == 2:
            assert request.num_cached_tokens == 0, "the image is the same, alpha is not"
    assert (request.num_cached_tokens or 0) > 256


@pytest.mark.parametrize("number", [1, 2])
def test_an_answer_continues_with_the_alpha_of_its_prompt(number: int) -> None:
    """Tokens that were delivered already do not count as prompt."""
    group = Group(LONG)
    golden = request_of(LONG, number)
    group.add(golden, "r", num_delivered=9)
    assert group.answers() == {"r": golden.answer[9:]}


@pytest.mark.parametrize(
    ("name", "number", "world_size"),
    [(LONG, 1, 2), (LONG, 1, 4), ("c_box_two_images", 0, 8), ("a_chat_image", 0, 8)],
)
def test_the_shares_of_all_ranks_make_the_whole_model(
    name: str, number: int, world_size: int
) -> None:
    golden = request_of(name, number)
    for logits in ThreadGroup(world_size).run(lambda shard: forced_logits(golden, shard=shard)):
        check_logits(golden, logits)


def test_every_tensor_of_the_model_is_read() -> None:
    loaded = Group(LONG).loaded
    assert loaded == sorted(loaded) and loaded[-1] == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"seq_length": None}, "seq_length"),
        ({"seq_length": 1}, "seq_length"),
        ({"rotary_emb_base": None}, "lacks 'rotary_emb_base'"),
        ({"kv_channels": None}, "lacks 'kv_channels'"),
        ({"no_bias": False}, "only True is supported"),
        ({"rotary_pct": 0.5}, r"rotary_pct is 0.5 in config.json, only 1.0"),
        ({"intermediate_size": 256}, r"config.json makes it \(128, 128\)"),
        ({"kv_channels": 16}, r"config.json makes it \(128, 64\)"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(request_of(LONG, 0).case.checkpoint, tmp_path / "model")
    whole = json.loads((folder / "config.json").read_text()) | config
    known = {key: value for key, value in whole.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(known))
    with pytest.raises(BadCheckpoint, match=message):
        families.load(open_checkpoint(folder), torch.float32, CPU)


def test_a_number_of_ranks_that_does_not_divide_is_refused() -> None:
    with pytest.raises(BadCheckpoint, match=r"use --tp 1, 2, 4$"):
        Group(LONG, shard=Shard(0, 8))


DIFFERENCES = {
    ("bfloat16", "none"): 0.5,
    ("float16", "none"): 0.05,
    ("bfloat16", "int8"): 1.0,
}
"""How far logits may lie from those in float32, which reach 25."""


@pytest.mark.parametrize(("dtype", "quantization"), DIFFERENCES)
@pytest.mark.parametrize("name", CASES)
def test_smaller_numbers_stay_near_the_reference(name: str, dtype: str, quantization: str) -> None:
    if quantization == "int8" and int8_kernels() is None:
        pytest.skip("no AVX2, or no compiler")
    num_clear = 0
    for golden in requests_of(name):
        logits = forced_logits(golden, dtype=getattr(torch, dtype), quantization=quantization)
        assert max_difference(logits, golden.logits) < DIFFERENCES[dtype, quantization]
        best = np.sort(golden.logits, 1)
        is_clear = best[:, -1] - best[:, -2] > 0.5
        num_clear += is_clear.sum()
        assert (logits.argmax(1) == golden.answer)[is_clear].all()
    assert num_clear > 40


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_adapter_computes_what_a_merged_checkpoint_computes(
    world_size: int, tmp_path: Path
) -> None:
    golden = request_of("a_chat_image", 0)
    model = golden.case.checkpoint
    adapter = write_adapter(tmp_path / "adapter", model)
    merged = open_checkpoint(merge(model, adapter, tmp_path / "merged"))

    def logits_of(checkpoint: Checkpoint, shard: Shard, number: int) -> np.ndarray:
        sampler = Forced(golden.answer)
        group = Group(golden.case.name, shard=shard, checkpoint=checkpoint, sampler=sampler)
        if number:
            files = open_adapter(adapter, checkpoint, 64)
            group.runner.use_adapter(number, group.runner.prepare_adapter(files))
            group.engine.adapters.add(Resident(number, "a", "/a", files.identity))
        group.add(golden, "r", adapter="a" if number else "")
        group.answers()
        return torch.cat(group.logits).numpy()

    expected = logits_of(merged, Shard(), 0)
    for found in ThreadGroup(world_size).run(
        lambda shard: logits_of(open_checkpoint(model), shard, 1)
    ):
        assert max_difference(found, expected) < 1e-3
    assert max_difference(expected, logits_of(open_checkpoint(model), Shard(), 0)) > 0.01
