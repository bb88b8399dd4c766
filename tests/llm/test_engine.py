"""Prompt, embeddings and abort; how answers end; what is wrong with one request harms
no other."""

import json
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from common.checkpoint import open_checkpoint
from common.messages import RequestKey, Sibling
from common.vocabulary import Vocabulary, open_vocabulary
from common.wire import Tensor
from compute.torch_tensors import to_wire
from services.llm.engine import Engine, Output, timings_of, usage_of
from services.llm.guided_decoding import GuidedDecoding
from services.llm.model_runner import ModelRunner
from services.llm.request import Request
from services.llm.sampler import Sampler
from services.llm.step_plan import StepPlan
from tests.golden import CASES_WITH_ITEMS, GoldenCase
from tests.llm.builders import (
    BLOCK_SIZE,
    HIDDEN_SIZE,
    VOCAB_SIZE,
    FakeRunner,
    assert_blocks_are_owned,
    create_prompt,
    create_request,
    create_scheduler,
    embeddings,
    expected_output,
)

NUM_BLOCKS = 16
POISON = 48
"""A token after which the fake model computes not finites."""
IMAGE = ((2, 5, 1),)
KEY = ("r", 0)


class LogitsRunner(FakeRunner):
    """Gives the next token by a row of logits of which it is the best."""

    def execute(self, plan: StepPlan, embeddings: list[torch.Tensor]) -> torch.Tensor:
        logits = torch.nn.functional.one_hot(
            torch.tensor(self.next_tokens(plan, embeddings), dtype=torch.int64), VOCAB_SIZE
        ).float()
        seqs = np.searchsorted(plan.query_lens.cumsum() - 1, plan.sampled_rows)
        for row, (table, context) in enumerate(
            zip(plan.block_tables[seqs], plan.context_lens[seqs], strict=True)
        ):
            if (
                self.cache.reshape(-1, BLOCK_SIZE, 4)[table].reshape(-1, 4)[:context, 0] == POISON
            ).any():
                logits[row] = torch.nan
        return logits


def create_engine(eos_token_ids: tuple[int, ...] = (), **scheduler: Any) -> Engine:
    made = create_scheduler(num_blocks=NUM_BLOCKS, **scheduler)
    return Engine(
        made,
        LogitsRunner(NUM_BLOCKS).execute,
        Sampler(),
        GuidedDecoding(no_vocabulary, VOCAB_SIZE, eos_token_ids),
        HIDDEN_SIZE,
        eos_token_ids,
    )


def no_vocabulary() -> Vocabulary:
    raise AssertionError("only a grammar needs the vocabulary")


def images(content: int = 1, length: int = 5) -> torch.Tensor:
    return torch.from_numpy(embeddings(content, length))


def send_embeddings(
    engine: Engine, tensor: torch.Tensor, image: int = 0, key: RequestKey = KEY
) -> str | None:
    request = engine.requests.get(key)
    mm_hash = (request.mm_hash(image) if request else None) or ""
    return engine.add_embeddings((*key, image), mm_hash, to_wire(tensor), {"encode_seconds": 1.0})


def outputs_of(engine: Engine) -> list[Output]:
    """All outputs until nothing can be computed."""
    found: list[Output] = []
    while (outputs := engine.step()) is not None:
        found += outputs
        assert len(found) < 1000, "no end"
    return found


def answer(outputs: list[Output], request_id: str = "r") -> tuple[list[int], str]:
    """The ids and the finish reason; offsets without a gap, one end."""
    own = [output for output in outputs if output.request.prompt.request_id == request_id]
    ids: list[int] = []
    for output in own:
        assert output.offset == len(ids)
        ids += output.token_ids
    assert all(not o.finish_reason and not o.error for o in own[:-1]), "only the last is the end"
    return ids, own[-1].finish_reason if own else ""


def undisturbed(**fields: Any) -> list[int]:
    return expected_output(create_request(**fields))


def assert_nothing_is_held(engine: Engine) -> None:
    assert not engine.requests and not engine.sampler._requests
    assert engine.scheduler.pool.num_free == NUM_BLOCKS
    assert_blocks_are_owned(engine.scheduler)


# Any order


def test_embeddings_after_their_prompt() -> None:
    engine = create_engine()
    assert engine.add(create_prompt(images=IMAGE))
    assert outputs_of(engine) == []
    assert send_embeddings(engine, images()) == ""
    assert answer(outputs_of(engine)) == (undisturbed(images=IMAGE), "length")
    assert_nothing_is_held(engine)


def test_embeddings_without_a_prompt_are_not_kept() -> None:
    """Vision encodes an item only once its prompt has reserved room for it."""
    engine = create_engine()
    assert send_embeddings(engine, images()) is None
    assert_nothing_is_held(engine)


def test_embeddings_under_another_name_are_not_taken() -> None:
    engine = create_engine()
    engine.add(create_prompt(images=IMAGE))
    assert engine.add_embeddings((*KEY, 0), "02" * 32, to_wire(images(2)), {}) is None
    assert send_embeddings(engine, images()) == ""
    assert answer(outputs_of(engine))[0] == undisturbed(images=IMAGE)


def test_embeddings_that_come_twice_are_taken_once() -> None:
    engine = create_engine()
    engine.add(create_prompt(images=IMAGE))
    assert [send_embeddings(engine, images()), send_embeddings(engine, images(content=2))] == [
        "",
        "",
    ]
    assert answer(outputs_of(engine))[0] == undisturbed(images=IMAGE)


def test_embeddings_that_come_after_the_end_are_acknowledged_and_dropped() -> None:
    engine = create_engine()
    engine.add(create_prompt())
    outputs_of(engine)
    assert send_embeddings(engine, images()) == ""
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("owner", ["preprocess", "gateway"])
def test_an_abort_before_the_prompt_cancels_it(owner: str) -> None:
    engine = create_engine()
    assert engine.abort_of(owner, KEY) == []
    assert not engine.add(create_prompt(images=IMAGE), "preprocess")
    assert engine.step() is None
    assert_nothing_is_held(engine)


def test_an_abort_of_another_peer_cancels_nothing() -> None:
    engine = create_engine()
    engine.abort_of("another", KEY)
    assert engine.add(create_prompt(), "preprocess")
    engine.abort_of("another", KEY)
    assert answer(outputs_of(engine)) == (undisturbed(), "length")


def test_an_abort_between_prompt_and_embeddings_frees_what_is_held() -> None:
    engine = create_engine()
    engine.add(create_prompt(images=IMAGE))
    engine.step()
    engine.abort([KEY])
    assert send_embeddings(engine, images()) == ""
    assert engine.step() is None
    assert_nothing_is_held(engine)


def test_an_abort_amid_the_answer_frees_what_is_held() -> None:
    engine = create_engine()
    engine.add(create_prompt(max_tokens=20))
    for _ in range(3):
        engine.step()
    engine.abort([KEY])
    assert engine.step() is None
    assert_nothing_is_held(engine)


def test_an_abort_of_one_attempt_leaves_the_next() -> None:
    engine = create_engine()
    engine.abort([KEY])
    engine.add(create_prompt(attempt=1))
    assert answer(outputs_of(engine)) == (undisturbed(), "length")


def test_several_images_may_come_in_any_order() -> None:
    three = ((1, 2, 1), (4, 3, 2), (9, 4, 3))
    engine = create_engine()
    engine.add(create_prompt(num_tokens=14, images=three))
    for image in (2, 0, 1):
        engine.step()
        assert send_embeddings(engine, images(three[image][2], three[image][1]), image) == ""
    assert answer(outputs_of(engine))[0] == undisturbed(num_tokens=14, images=three)


# What cannot be used


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (images(length=4), "(4, 2)), floating-point (5, 2) is wanted"),
        (torch.zeros(5, 3), "(5, 3))"),
        (torch.zeros(10), "(10,))"),
        (torch.zeros(0), "(0,))"),
        (torch.zeros(0, 2), "(0, 2))"),
        (torch.zeros(5, 2, dtype=torch.int64), "int64"),
        (torch.full((5, 2), torch.nan), "not finite"),
        (torch.full((5, 2), torch.inf), "not finite"),
    ],
)
def test_bad_embeddings_are_refused_by_name_and_good_ones_still_taken(
    tensor: torch.Tensor, reason: str
) -> None:
    engine = create_engine()
    engine.add(create_prompt(images=IMAGE))
    assert reason in (send_embeddings(engine, tensor) or "")
    assert outputs_of(engine) == []
    send_embeddings(engine, images())
    assert answer(outputs_of(engine))[0] == undisturbed(images=IMAGE)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 5, 9])
def test_one_bad_element_is_found(bad: float, dtype: torch.dtype, place: int) -> None:
    engine = create_engine()
    engine.add(create_prompt(images=IMAGE))
    tensor = torch.ones(5, 2, dtype=dtype)
    tensor.view(-1)[place] = bad
    assert "not finite" in send_embeddings(engine, tensor)


def test_embeddings_that_the_models_dtype_cannot_hold_are_refused() -> None:
    engine = create_engine()
    engine._dtype = torch.float16
    engine.add(create_prompt(images=IMAGE))
    assert "not finite" in (send_embeddings(engine, torch.full((5, 2), 1e6)) or "")


def test_a_request_whose_logits_are_no_numbers_fails_alone() -> None:
    engine = create_engine()
    engine.add(create_prompt("bad", token_ids=[1, POISON, 2]))
    engine.add(create_prompt("good"))
    outputs = outputs_of(engine)
    (bad,) = [o for o in outputs if o.request.prompt.request_id == "bad"]
    assert "not finite" in bad.error and bad.token_ids == []
    assert answer(outputs, "good") == (undisturbed(), "length")
    assert_nothing_is_held(engine)


def test_what_a_failed_request_computed_is_not_taken_over() -> None:
    engine = create_engine()
    ids = [1, POISON, *range(2, 12)]
    engine.add(create_prompt("bad", token_ids=ids))
    outputs_of(engine)
    engine.add(create_prompt("again", token_ids=ids))
    assert engine.requests["again", 0].num_cached_tokens is None
    (again,) = outputs_of(engine)
    assert again.request.num_cached_tokens == 0


# Ends


def test_an_answer_ends_at_max_tokens() -> None:
    engine = create_engine()
    engine.add(create_prompt(max_tokens=7))
    assert answer(outputs_of(engine)) == (undisturbed(max_tokens=7), "length")


def test_an_answer_ends_at_a_stop_id() -> None:
    expected = undisturbed(max_tokens=9)
    engine = create_engine()
    engine.add(create_prompt(max_tokens=9, stop_token_ids=(expected[4],)))
    assert answer(outputs_of(engine)) == (expected[: expected.index(expected[4]) + 1], "stop")


def test_an_answer_ends_at_the_end_of_sequence() -> None:
    expected = undisturbed(max_tokens=9)
    engine = create_engine(eos_token_ids=(expected[3],))
    engine.add(create_prompt(max_tokens=9))
    assert answer(outputs_of(engine)) == (expected[: expected.index(expected[3]) + 1], "stop")
    assert_nothing_is_held(engine)


def test_an_end_of_sequence_can_be_ignored() -> None:
    expected = undisturbed(max_tokens=9)
    engine = create_engine(eos_token_ids=(expected[3],))
    engine.add(create_prompt(max_tokens=9, ignore_eos=True))
    assert answer(outputs_of(engine)) == (expected, "length")


def test_no_answer_ends_before_min_tokens() -> None:
    eos = undisturbed()[0]
    engine = create_engine(eos_token_ids=(eos,))
    engine.add(create_prompt(max_tokens=9, min_tokens=5))
    ids, _ = answer(outputs_of(engine))
    assert len(ids) >= 5 and eos not in ids[:5]


def test_a_stop_id_that_is_the_last_token_is_a_stop() -> None:
    expected = undisturbed(max_tokens=1)
    engine = create_engine()
    engine.add(create_prompt(max_tokens=1, stop_token_ids=(expected[0],)))
    assert answer(outputs_of(engine)) == (expected, "stop")


# Many at once


def test_preemption_changes_no_answer() -> None:
    """Sampled, with penalties: what the sampler remembers must survive, too."""
    sampled = {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "seed": 4}
    prompts = [
        create_prompt(str(i), token_ids=[i + 1] * 12, max_tokens=24, sampling=sampled)
        for i in range(3)
    ]
    engine = create_engine()
    for prompt in prompts:
        engine.add(prompt)
    together = outputs_of(engine)
    assert engine.scheduler.num_preemptions > 0
    for prompt in prompts:
        alone = create_engine()
        alone.add(prompt)
        assert answer(together, prompt.request_id) == answer(outputs_of(alone), prompt.request_id)


def test_a_gateways_death_ends_its_requests_only() -> None:
    engine = create_engine()
    engine.add(create_prompt("a", gateway_id="dead"))
    engine.add(create_prompt("b"))
    engine.step()
    engine.abort(engine.keys_of("dead"))
    assert list(engine.requests) == [("b", 0)]
    outputs_of(engine)
    assert_nothing_is_held(engine)


def test_a_preprocess_death_ends_the_requests_whose_items_it_still_holds() -> None:
    engine = create_engine()
    engine.add(create_prompt("misses", images=IMAGE), "dead")
    engine.add(create_prompt("other", images=IMAGE), "alive")
    engine.add(create_prompt("has", images=IMAGE), "dead")
    send_embeddings(engine, images(), key=("has", 0))
    assert engine.keys_of("dead") == [("misses", 0)]


# What is told of a request


def test_usage_tells_what_the_prefix_cache_had() -> None:
    engine = create_engine()
    for request_id in "ab":
        engine.add(create_prompt(request_id, 16, images=IMAGE))
        send_embeddings(engine, images(), key=(request_id, 0))
        usage = usage_of(outputs_of(engine)[0].request)
        assert (usage.prompt_tokens, usage.image_tokens) == (16, 5)
        assert usage.cached_tokens == (0 if request_id == "a" else 12)


def test_timings_join_what_each_stage_told() -> None:
    engine = create_engine()
    engine.add(create_prompt(images=IMAGE))
    request: Request = engine.requests[KEY]
    send_embeddings(engine, images())
    outputs_of(engine)
    timings = json.loads(timings_of(request))
    assert timings["preprocess_seconds"] == 0.5 and timings["images"] == [{"encode_seconds": 1.0}]
    assert timings["queue_seconds"] >= 0 and timings["prefill_seconds"] >= 0


def test_an_image_that_the_prefix_cache_covers_needs_no_embeddings() -> None:
    engine = create_engine()
    engine.add(create_prompt("a", 16, images=IMAGE))
    send_embeddings(engine, images(), key=("a", 0))
    outputs_of(engine)
    engine.add(create_prompt("b", 16, images=IMAGE))
    outputs = outputs_of(engine)
    assert answer(outputs, "b")[0] == undisturbed(num_tokens=16, images=IMAGE)
    assert json.loads(timings_of(outputs[0].request))["images"][0]["cached"]


def test_an_answer_that_its_grammar_gives_up_is_an_error_and_not_complete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = create_engine()
    monkeypatch.setattr(engine.guided_decoding, "accept", lambda key, token_id: False)
    monkeypatch.setattr(engine.guided_decoding, "failure_of", lambda key: "it gave up")
    engine.add(create_prompt())
    (output,) = outputs_of(engine)
    assert (output.token_ids, output.finish_reason, output.error) == ([], "", "it gave up")
    assert not engine.requests


GOLDEN_BLOCK_SIZE = 8


def golden_engine(case: GoldenCase, num_blocks: int) -> Engine:
    checkpoint = open_checkpoint(case.checkpoint)
    device = torch.device("cpu")
    runner = ModelRunner(checkpoint, torch.float32, device, num_blocks, GOLDEN_BLOCK_SIZE)
    scheduler = create_scheduler(
        num_blocks=num_blocks, block_size=GOLDEN_BLOCK_SIZE, max_num_batched_tokens=24
    )
    guides = GuidedDecoding(
        partial(open_vocabulary, checkpoint), runner.vocab_size, checkpoint.eos_token_ids
    )
    return Engine(
        scheduler, runner.execute, Sampler(), guides, runner.input_width, checkpoint.eos_token_ids
    )


def add_golden(
    engine: Engine, case: GoldenCase, request_id: str, siblings: tuple[Sibling, ...] = ()
) -> None:
    images = [(offset, length, n) for n, (offset, length) in enumerate(image_ranges(case))]
    prompt = create_prompt(
        request_id,
        token_ids=case.expected["input_ids"],
        images=tuple(images),
        max_tokens=len(case.expected["greedy_ids"]),
        ignore_eos=True,
    )
    prompt.positions = Tensor.of(case.tensors["position_ids"])
    prompt.rope_delta = case.expected["rope_delta"]
    prompt.siblings = siblings
    engine.add(prompt)


def send_golden(engine: Engine, case: GoldenCase, request_id: str) -> None:
    rows = torch.from_numpy(case.embeddings).split([length for _, length in image_ranges(case)])
    for image, part in enumerate(rows):
        assert send_embeddings(engine, part, image, (request_id, 0)) == ""


@pytest.mark.parametrize("name", CASES_WITH_ITEMS)
def test_a_cached_prefix_with_its_images_gives_the_references_answer(name: str) -> None:
    """The second request brings no embeddings: the cache covers them."""
    case = GoldenCase(name)
    engine = golden_engine(case, num_blocks=96)
    for request_id in "ab":
        add_golden(engine, case, request_id)
        if request_id == "a":
            send_golden(engine, case, "a")
        outputs = outputs_of(engine)
        assert answer(outputs, request_id) == (case.expected["greedy_ids"], "length")
    num_whole_blocks = (len(case.expected["input_ids"]) - 1) // GOLDEN_BLOCK_SIZE
    assert usage_of(outputs[0].request).cached_tokens == num_whole_blocks * GOLDEN_BLOCK_SIZE


def test_a_request_with_a_video_that_was_preempted_gives_the_references_answer() -> None:
    """There is room for both prompts, but not for both answers."""
    case = GoldenCase("e_video")
    blocks_of_prompt = -(-len(case.expected["input_ids"]) // GOLDEN_BLOCK_SIZE)
    engine = golden_engine(case, num_blocks=2 * blocks_of_prompt + 1)
    for number, request_id in enumerate("ab"):
        add_golden(engine, case, request_id)
        # Otherwise the second one would share the blocks of the first.
        engine.requests[request_id, 0].prompt.cache_salt = bytes([number])
        send_golden(engine, case, request_id)
    outputs = outputs_of(engine)
    expected = case.expected["greedy_ids"], "length"
    assert [answer(outputs, request_id) for request_id in "ab"] == [expected] * 2
    assert engine.scheduler.num_preemptions > 0


def image_ranges(case: GoldenCase) -> list[tuple[int, int]]:
    """(offset, length) of each run of placeholders."""
    bounds = np.flatnonzero(np.diff(case.is_placeholder, prepend=False, append=False)).reshape(
        -1, 2
    )
    return [(int(begin), int(end - begin)) for begin, end in bounds]


def test_logprobs_come_with_the_token_where_they_are_asked_for() -> None:
    engine = create_engine()
    engine.add(create_prompt("with", sampling={"num_logprobs": 2}))
    engine.add(create_prompt("without"))
    for output in outputs_of(engine):
        found = output.logprobs
        assert (found is not None) == (output.request.prompt.request_id == "with")
        assert found is None or found.top_token_ids[0] == output.token_ids[0]


def test_a_request_past_its_deadline_is_freed_though_no_abort_came() -> None:
    engine = create_engine()
    engine.add(create_prompt("late", images=IMAGE))
    arrived = engine.requests["late", 0].arrived
    engine.abort(engine.expired_keys(arrived + 59))
    assert engine.requests
    engine.abort(engine.expired_keys(arrived + 61))
    assert not engine.holds_anything
    assert_blocks_are_owned(engine.scheduler)
    assert send_embeddings(engine, images(), key=("late", 0)) == ""


def test_an_image_that_was_not_awaited_has_timings_all_the_same() -> None:
    request = create_request(images=IMAGE, has_embeddings=False)
    request.first_scheduled = request.first_token = request.arrived
    (image,) = json.loads(timings_of(request))["images"]
    assert image["cached"] and image["encode_seconds"] == 0


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.3},
    ],
)
@pytest.mark.parametrize("num_delivered", [1, 3, 7])
def test_a_resumed_answer_is_the_one_it_would_have_been(
    sampling: dict[str, Any], num_delivered: int
) -> None:
    whole = answer(outputs_of(engine_with(create_prompt(max_tokens=8, sampling=sampling))))[0]
    assert len(whole) == 8
    delivered = Tensor.of(np.array(whole[:num_delivered], np.int64))
    resumed = msgspec.structs.replace(
        create_prompt(attempt=1, max_tokens=8, sampling=sampling), output_token_ids=delivered
    )
    outputs = outputs_of(engine_with(resumed))
    assert outputs[0].offset == num_delivered
    assert [token for output in outputs for token in output.token_ids] == whole[num_delivered:]
    assert outputs[-1].finish_reason == "length"
    assert outputs[0].request.num_prompt_tokens == 8, "what was delivered is no prompt"


def engine_with(prompt: Any) -> Engine:
    engine = create_engine()
    engine.add(prompt)
    return engine
