"""Several sampled answers to one request over gRPC, whole and streamed."""

from collections.abc import Callable

from proto.twinlens.inference.v1 import inference_pb2
from tests.system.running import Running
from tests.system.sampled import deltas, gap_of, generate, sampled_request

NUM_CHOICES = 3
Answers = list[list[int]]
"""The token ids of each answer."""


def request_for(n: int, max_tokens: int, choices: int) -> inference_pb2.GenerateRequest:
    request = sampled_request(n, max_tokens)
    request.n = choices
    return request


def whole_answers(system: Running, request: inference_pb2.GenerateRequest) -> tuple[Answers, float]:
    """Return the token ids of each answer, and the smallest gap of a draw of any."""
    answer = generate(system, request)
    all_logprobs = [answer.logprobs, *(choice.logprobs for choice in answer.more_choices)]
    gaps = [
        gap_of(entry, request.sampling.seed + index, position)
        for index, logprobs in enumerate(all_logprobs)
        for position, entry in enumerate(logprobs)
    ]
    ids = [list(answer.token_ids), *(list(choice.token_ids) for choice in answer.more_choices)]
    return ids, min(gaps)


def streamed_answers(
    system: Running,
    request: inference_pb2.GenerateRequest,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Answers:
    """Return the token ids of each answer. Calls `on_tokens` with the number of all so far."""
    ids: Answers = [[] for _ in range(request.n)]
    for delta in deltas(system, request):
        assert delta.offset == len(ids[delta.choice])
        ids[delta.choice] += delta.token_ids
        on_tokens(sum(map(len, ids)))
    return ids


def assert_choices_are_single_answers(system: Running, max_tokens: int = 24) -> None:
    """Each of several answers is what a request for one gets with its seed."""
    request = request_for(0, max_tokens, NUM_CHOICES)
    together, gap = whole_answers(system, request)
    assert gap > 1e-4, "choose another question: this one has a near tie"
    assert len({tuple(ids) for ids in together}) == NUM_CHOICES, "each seed has its own answer"
    assert streamed_answers(system, request) == together
    request.n = 1
    for ids in together:
        assert whole_answers(system, request)[0] == [ids]
        request.sampling.seed += 1


def assert_greedy_choices_are_equal(system: Running, max_tokens: int = 24) -> None:
    request = request_for(0, max_tokens, NUM_CHOICES)
    request.sampling.temperature = 0
    answer = generate(system, request)
    assert [choice.token_ids for choice in answer.more_choices] == [answer.token_ids] * 2
    assert answer.usage.completion_tokens == NUM_CHOICES * max_tokens
    request.n = 1
    alone = generate(system, request)
    assert alone.token_ids == answer.token_ids
    assert alone.usage.prompt_tokens == answer.usage.prompt_tokens
