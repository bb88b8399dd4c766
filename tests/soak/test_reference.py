"""Which steps of an undisturbed answer are near ties."""

import math

import pytest
import torch

from common.messages import Sampling, Stopping
from services.llm.sampler import Sampler
from tests.soak.reference import TIE, Candidates, gap, scores
from tests.soak.workload import SAMPLED_TOP_K, Question

GREEDY = Question("what", (), 4, True, (), 0.0, 0)
SAMPLED = Question("what", (), 4, True, (), 0.8, 12345)


def candidates(*logprobs: float) -> Candidates:
    return [(token_id + 10, logprob) for token_id, logprob in enumerate(logprobs)]


@pytest.mark.parametrize(
    ("second", "is_tie"),
    [(-1.0, False), (-0.5 - 2 * TIE, False), (-0.5 - TIE / 2, True), (-0.5, True)],
)
def test_greedy_steps_are_near_ties_where_the_best_two_are_near(
    second: float, is_tie: bool
) -> None:
    assert (gap(GREEDY, 0, candidates(-0.5, second, -3.0)) < TIE) == is_tie


def logits_of(seed: int) -> torch.Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(seed)) * 3


def ranked(logits: torch.Tensor) -> Candidates:
    values, ids = logits.log_softmax(-1).topk(20)
    return list(zip(ids.tolist(), values.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_the_best_score_is_the_token_that_the_sampler_draws(seed: int) -> None:
    sampler = Sampler()
    question = Question("what", (), 4, True, (), 0.8, 1000 + seed)
    sampling = Sampling(
        temperature=0.8,
        top_p=1.0,
        top_k=SAMPLED_TOP_K,
        min_p=0.0,
        repetition_penalty=1.0,
        seed=question.seed,
    )
    sampler.add("r", sampling, Stopping(), torch.zeros(1, dtype=torch.int64).numpy(), [], ())
    drawn = sampler.sample(logits_of(seed)[None], ["r"], [seed]).token_ids[0]
    found = ranked(logits_of(seed))
    best = max(range(SAMPLED_TOP_K), key=scores(question, seed, found).__getitem__)
    assert found[best][0] == drawn


def test_sampled_steps_are_near_ties_where_the_noise_makes_the_best_two_near() -> None:
    found = ranked(logits_of(1))
    drawn = scores(SAMPLED, 3, found)
    first, second = sorted(range(SAMPLED_TOP_K), key=drawn.__getitem__)[::-1][:2]
    assert gap(SAMPLED, 3, found) > TIE
    token_id, logprob = found[second]
    found[second] = (
        token_id,
        logprob + (drawn[first] - drawn[second] - TIE / 2) * SAMPLED.temperature,
    )
    assert gap(SAMPLED, 3, found) < TIE


def test_the_edge_of_the_filter_matters_only_where_who_stands_there_would_win() -> None:
    flat = candidates(*[-1.0 - n for n in range(SAMPLED_TOP_K - 1)], -9.0, -9.0, *[-20.0] * 11)
    winners = [
        math.isclose(max(s[:SAMPLED_TOP_K]), s[SAMPLED_TOP_K - 1])
        for s in (scores(SAMPLED, n, flat) for n in range(50))
    ]
    assert not any(winners), "this filter's edge never wins"
    assert all(gap(SAMPLED, n, flat) > 0 for n in range(50))
    near = [(token_id, -1.0) for token_id, _ in flat]
    assert any(gap(SAMPLED, n, near) == 0 for n in range(50))
