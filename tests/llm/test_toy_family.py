"""A family with everything that a family may add equals plain loops, however its steps are cut."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.checkpoint import open_checkpoint
from common.families import FAMILIES
from common.messages import Peer, Prompt, Sampling, Stopping
from common.vocabulary import open_vocabulary
from common.wire import Tensor as WireTensor
from compute.torch_tensors import to_wire
from services.llm import families
from services.llm.block_pool import BlockPool
from services.llm.decoder import Decoder
from services.llm.engine import Engine
from services.llm.fused_decode import FusedDecode
from services.llm.guided_decoding import GuidedDecoding
from services.llm.model_runner import ModelRunner
from services.llm.sampler import Sampler
from services.llm.scheduler import Scheduler
from tests.toy_family import language
from tests.toy_family.checkpoint import END_ID, PICTURE_ID, WIDTH, make_checkpoint
from tests.toy_family.description import Toy
from tests.toy_family.plain import PlainModel

CPU = torch.device("cpu")
NUM_TOKENS = 9
TIE = 3e-4
BLOCK_SIZE = 4
"""Shorter than an item, so that items share blocks with text."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("toy"))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", Toy())
    monkeypatch.setitem(families.FAMILIES, "toy", language.load)


class Case:
    """A prompt with two items, and what the plain loops answer."""

    def __init__(self, folder: Path, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.token_ids = random.integers(0, 256, int(random.integers(25, 45)))
        # Every other prompt ends with an item, so that the sampled row is an item's.
        last = len(self.token_ids) - 6 if seed % 2 else 14
        self.spans = [(3 + seed % 3, 5), (last, 6)]
        for offset, length in self.spans:
            self.token_ids[offset : offset + length] = PICTURE_ID
        self.positions = random.integers(0, 40, (2, len(self.token_ids)))
        self.rope_parameter = 1 + seed % 3
        self.rope_delta = 4 - seed
        generator = torch.Generator().manual_seed(seed)
        self.embeddings = [
            torch.randn(length, WIDTH, generator=generator) for _, length in self.spans
        ]
        rows: dict[int, Tensor] = {}
        for (offset, length), own in zip(self.spans, self.embeddings, strict=True):
            rows |= {offset + i: own[i] for i in range(length)}
        self.answer, self.gap = PlainModel(folder).generate(
            self.token_ids.tolist(),
            [(int(a), int(b)) for a, b in self.positions.T],
            rows,
            self.rope_parameter,
            self.rope_delta,
            NUM_TOKENS,
        )

    def prompt(self, request_id: str, **fields: Any) -> Prompt:
        hashes = [[hash(e.sum().item()) % 256] * 32 for e in self.embeddings]
        greedy = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
        return Prompt(
            request_id=request_id,
            attempt=0,
            gateway_id="gateway",
            token_ids=WireTensor.of(self.token_ids),
            positions=WireTensor.of(self.positions),
            rope_delta=self.rope_delta,
            placeholders=WireTensor.of(np.array(self.spans, np.int64)),
            mm_hashes=WireTensor.of(np.array(hashes, np.uint8)),
            sampling=greedy,
            stopping=Stopping(max_tokens=NUM_TOKENS, ignore_eos=True),
            detokenizer=Peer("detokenizer", "tcp://127.0.0.1:1"),
            timeout=60.0,
            timings=WireTensor.of_text('{"images": [{}, {}]}'),
            rope_parameter=self.rope_parameter,
            cache_salt=bytes([self.rope_parameter]),
            **fields,
        )


@pytest.fixture(scope="module")
def cases(folder: Path) -> list[Case]:
    made = [Case(folder, seed) for seed in range(6)]
    clear = [case for case in made if case.gap > TIE]
    assert len(clear) >= 4
    return clear


class Group:
    """An engine with a real model."""

    def __init__(self, folder: Path, num_blocks: int = 200, chunk: int = 7) -> None:
        checkpoint = open_checkpoint(folder)
        self.runner = ModelRunner(checkpoint, torch.float32, CPU, num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(BlockPool(num_blocks), BLOCK_SIZE, 16, chunk)
        self.engine = Engine(
            self.scheduler,
            self.runner.execute,
            Sampler(),
            GuidedDecoding(partial(open_vocabulary, checkpoint), 320, (END_ID,)),
            WIDTH,
            (END_ID,),
            num_position_components=2,
        )

    def add(self, case: Case, request_id: str, **fields: Any) -> None:
        assert self.engine.add(case.prompt(request_id, **fields))
        for item, embeddings in enumerate(case.embeddings):
            key = (request_id, 0, item)
            mm_hash = self.engine.requests[key[:2]].mm_hash(item) or ""
            wire = to_wire(embeddings)
            assert self.engine.add_embeddings(key, mm_hash, wire, {}) == ""

    def answers(self) -> dict[str, list[int]]:
        """Step until nothing is left to compute."""
        found: dict[str, list[int]] = {}
        for outputs in self._steps():
            for output in outputs:
                assert not output.error
                found.setdefault(output.request.key[0], []).extend(output.token_ids)
        return found

    def _steps(self) -> Iterator[list[Any]]:
        while (outputs := self.engine.step()) is not None:
            yield outputs


@pytest.mark.parametrize("chunk", [3, 7, 1024])
def test_requests_in_flight_together_equal_plain_loops(
    folder: Path, cases: list[Case], chunk: int
) -> None:
    group = Group(folder, chunk=chunk)
    for i, case in enumerate(cases):
        group.add(case, str(i))
    answers = group.answers()
    assert answers == {str(i): case.answer for i, case in enumerate(cases)}


def test_preempted_requests_equal_plain_loops(folder: Path, cases: list[Case]) -> None:
    group = Group(folder, num_blocks=33, chunk=16)
    for i, case in enumerate(cases):
        group.add(case, str(i))
    answers = group.answers()
    assert group.scheduler.num_preemptions > 0
    assert answers == {str(i): case.answer for i, case in enumerate(cases)}


def test_a_cached_prefix_gives_the_same(folder: Path, cases: list[Case]) -> None:
    group = Group(folder)
    for attempt in range(2):
        group.add(cases[0], str(attempt))
        request = group.engine.requests[str(attempt), 0]
        assert group.answers() == {str(attempt): cases[0].answer}
    assert (request.num_cached_tokens or 0) >= 20


def test_another_rope_parameter_shares_no_prefix(folder: Path, cases: list[Case]) -> None:
    group = Group(folder)
    group.add(cases[0], "0")
    group.answers()
    other = cases[0].prompt("1")
    other.rope_parameter += 1
    other.cache_salt = b"another"
    group.engine.add(other)
    request = group.engine.requests["1", 0]
    for item, embeddings in enumerate(cases[0].embeddings):
        group.engine.add_embeddings(("1", 0, item), embeddings, {}, "preprocess")
    assert group.answers() != {"1": cases[0].answer}
    assert request.num_cached_tokens == 0


def test_an_answer_continues_after_the_tokens_of_an_earlier_attempt(
    folder: Path, cases: list[Case]
) -> None:
    group = Group(folder)
    done = cases[1].answer[:5]
    group.add(cases[1], "r", output_token_ids=WireTensor.of(np.array(done)))
    assert group.answers() == {"r": cases[1].answer[5:]}


def test_a_model_that_is_unknown_takes_the_slow_path(folder: Path) -> None:
    group = Group(folder)
    model: Any = group.runner._model
    assert isinstance(model, Decoder) and model.fits_fused_decode

    class Other(Decoder):
        """It might compute anything."""

    plain = {field: getattr(model, field) for field in model.__dataclass_fields__}
    other = Other(**plain)
    assert not other.fits_fused_decode
    unknown: Any = object()
    for any_model in (other, unknown):
        assert FusedDecode.of(any_model, group.runner._kv_cache.bfloat16()) is None
