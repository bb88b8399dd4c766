"""Log-probabilities of prompts equal those of the reference, however the prompts are computed."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from common.messages import MAX_PROMPT_LOGPROBS
from common.wire import Tensor
from services.llm import scheduler
from services.llm.engine import Engine
from services.llm.prompt_logprobs import take_prompt_logits
from services.llm.request import objection_to
from services.llm.step_plan import StepPlan
from services.llm.worker import start_of
from tests.golden import GoldenCase, max_difference
from tests.llm.builders import PLACEHOLDER, create_prompt
from tests.llm.test_engine import (
    GOLDEN_BLOCK_SIZE,
    add_golden,
    answer,
    create_engine,
    golden_engine,
    outputs_of,
    send_golden,
)

CASES = ("a_image", "b_two_images_tied", "c_gqa_tp8", "e_video")
K = 3


def ask(engine: Engine, case: GoldenCase, request_id: str = "r", salt: bytes = b"") -> None:
    """Send a golden request that asks for the log-probabilities of its prompt."""
    add = engine.add

    def add_asking(prompt: Any) -> bool:
        sampling = msgspec.structs.replace(prompt.sampling, num_prompt_logprobs=K)
        return add(msgspec.structs.replace(prompt, sampling=sampling, cache_salt=salt))

    engine.add = add_asking  # type: ignore[method-assign, assignment]
    add_golden(engine, case, request_id)
    engine.add = add  # type: ignore[method-assign]
    send_golden(engine, case, request_id)


def assert_is_the_references(engine: Engine, case: GoldenCase, request_id: str = "r") -> None:
    outputs = outputs_of(engine)
    assert answer(outputs, request_id) == (case.expected["greedy_ids"], "length")
    [start] = [
        start_of(output)
        for output in outputs
        if output.request.prompt.request_id == request_id and output.offset == 0
    ]
    assert_start_is_the_references(start, case)


def assert_start_is_the_references(start: Any, case: GoldenCase) -> None:
    logits = torch.from_numpy(case.tensors["prefill_logits_all"])[:-1]
    expected = logits.log_softmax(-1)
    ids = torch.tensor(case.expected["input_ids"])
    chosen = expected.gather(1, ids[1:, None])
    order = expected.sort(dim=-1, descending=True, stable=True).indices
    assert start.prompt_token_ids.numpy()[~case.is_placeholder].tolist() == (
        ids[~torch.from_numpy(case.is_placeholder)].tolist()
    )
    is_text = ~case.is_placeholder[1:]
    found = start.prompt_logprobs.numpy()
    assert max_difference(found[is_text], chosen[:, 0].numpy()[is_text]) < 1e-3
    top = start.prompt_top_logprobs.numpy()
    assert max_difference(top, expected.gather(1, order[:, :K]).numpy()) < 1e-3
    ranks = (expected > chosen).sum(-1).numpy() + 1
    assert (start.prompt_ranks.numpy()[is_text] == ranks[is_text]).mean() > 0.95  # ties may turn
    assert (start.prompt_top_token_ids.numpy() == order[:, :K].numpy()).mean() > 0.95


@pytest.mark.parametrize("name", CASES)
def test_they_are_those_of_the_reference(name: str) -> None:
    case = GoldenCase(name)
    engine = golden_engine(case, num_blocks=96)
    ask(engine, case)
    assert_is_the_references(engine, case)


def test_they_are_computed_also_if_the_prefix_cache_has_the_prompt() -> None:
    case = GoldenCase("a_image")
    engine = golden_engine(case, num_blocks=96)
    add_golden(engine, case, "before")
    send_golden(engine, case, "before")
    outputs_of(engine)
    ask(engine, case)
    assert_is_the_references(engine, case)


def test_no_step_computes_more_rows_of_prompts_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler, "MAX_SCORED_ROWS", 7)
    case = GoldenCase("b_two_images_tied")
    engine = golden_engine(case, num_blocks=96)
    execute = engine.execute
    num_rows = []

    def counting(plan: StepPlan, embeddings: list[torch.Tensor]) -> torch.Tensor:
        num_rows.append(len(plan.sampled_rows))
        return execute(plan, embeddings)

    engine.execute = counting
    for request_id in "ab":
        ask(engine, case, request_id, salt=request_id.encode())
    outputs = outputs_of(engine)
    for request_id in "ab":
        first = next(o for o in outputs if o.request.prompt.request_id == request_id)
        assert_start_is_the_references(start_of(first), case)
        assert answer(outputs, request_id) == (case.expected["greedy_ids"], "length")
    assert max(num_rows) <= 7 + 2, "the rows of prompts, and one for each request's next token"


def test_they_survive_a_preemption() -> None:
    case = GoldenCase("e_video")
    blocks_of_prompt = -(-len(case.expected["input_ids"]) // GOLDEN_BLOCK_SIZE)
    engine = golden_engine(case, num_blocks=2 * blocks_of_prompt + 1)
    for request_id in "ab":
        ask(engine, case, request_id, salt=request_id.encode())
    scores = engine.requests["b", 0].prompt_scores
    assert scores is not None
    outputs = []
    while not 0 < scores.num_done < len(scores.logprobs):
        outputs += engine.step() or []
    # A preemption in the middle of the prompt. That of a decode comes by itself.
    engine.scheduler._preempt(engine.requests["b", 0])
    outputs += outputs_of(engine)
    starts = [start_of(o) for o in outputs if o.offset == 0]
    assert len(starts) == 2 and engine.scheduler.num_preemptions > 1
    for start in starts:
        assert_start_is_the_references(start, case)
    for request_id in "ab":
        own = [o for o in outputs if o.request.prompt.request_id == request_id]
        assert answer(own, request_id)[0] == case.expected["greedy_ids"]


def test_a_placeholder_outside_the_vocabulary_is_never_likely() -> None:
    engine = create_engine()
    image = ((2, 2, 1),)
    engine.add(create_prompt("r", images=image, sampling={"num_prompt_logprobs": 0}))
    request = engine.requests["r", 0]
    request.token_ids = np.where(request.token_ids == PLACEHOLDER, 10**9, request.token_ids)
    scores = request.prompt_scores
    assert scores is not None
    chunk = scheduler.Chunk(request, 0, request.num_tokens)
    vocab_size = engine.limits.vocab_size
    logits = torch.randn(request.num_tokens, vocab_size)
    assert take_prompt_logits([chunk], logits).tolist() == logits[-1:].tolist()
    assert np.isneginf(scores.logprobs[1:3]).all() and np.isfinite(scores.logprobs[3:]).all()
    assert (scores.ranks[1:3] == vocab_size + 1).all()


def test_an_attempt_that_continues_an_answer_computes_none() -> None:
    engine = create_engine()
    prompt = create_prompt(sampling={"num_prompt_logprobs": 1})
    engine.add(msgspec.structs.replace(prompt, output_token_ids=Tensor.of_int64([5])))
    assert engine.requests["r", 0].prompt_scores is None


def test_too_many_of_them_and_those_of_a_whole_prompt_are_refused() -> None:
    engine = golden_engine(GoldenCase("a_image"), num_blocks=1024)
    asked = {"num_prompt_logprobs": 20}
    count = MAX_PROMPT_LOGPROBS // 21 + 1
    long = create_prompt(num_tokens=count, token_ids=[5] * count, sampling=asked)
    assert "more than" in objection_to(long, engine.limits)
    whole = create_prompt(whole=True, sampling=asked)
    assert "one step" in objection_to(whole, engine.limits)
