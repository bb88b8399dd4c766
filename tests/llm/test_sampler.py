"""What is drawn, that it depends on nothing else in the batch, and that a bad row harms no
other."""

from typing import Any

import numpy as np
import pytest
import torch

from common.messages import Sampling, Stopping
from compute.noise import (
    NOISE_RANGE,
    gumbel_noise,
    keys_of,
    mix,
    mix_tensor,
    signed,
    states_of,
)
from services.llm.draws import FIRST_NUCLEUS_WIDTH, threshold
from services.llm.sampler import SampledTokens, Sampler
from tests.golden import CASES, GoldenCase, max_difference
from tests.llm.test_model_runner import Sequence, blocks_of, runner_of, step

NO_IDS = np.zeros(0, np.int64)


def sampling(**fields: Any) -> Sampling:
    return Sampling(
        **{"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        | fields
    )


def sample(
    rows: list[list[float]] | torch.Tensor, *samplings: Sampling, positions: list[int] | None = None
) -> SampledTokens:
    """One token a row, of requests that begin."""
    logits = torch.as_tensor(rows)
    sampler = Sampler()
    for key, one in enumerate(samplings):
        sampler.add(key, one, Stopping(), NO_IDS, [], ())
    return sampler.sample(logits, list(range(len(samplings))), positions or [0] * len(samplings))


def drawn(logits: list[float] | torch.Tensor, **fields: Any) -> list[int]:
    """What 4000 positions of one request draw from the same logits."""
    count = 4000
    one = sampling(**{"temperature": 1.0, "seed": 7} | fields)
    return sample(
        torch.as_tensor(logits).expand(count, -1), *[one] * count, positions=list(range(count))
    ).token_ids


def shares(token_ids: list[int], vocab_size: int) -> np.ndarray:
    return np.bincount(token_ids, minlength=vocab_size) / len(token_ids)


def outputs(sampler: Sampler, logits: list[float], count: int, first: int = 0) -> list[int]:
    return [
        sampler.sample(torch.tensor([logits]), ["r"], [first + i]).token_ids[0]
        for i in range(count)
    ]


def test_greedy_takes_the_best() -> None:
    assert sample(
        [[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]], sampling(), sampling(temperature=1e-6)
    ).token_ids == [1, 0]


def test_of_equal_logits_greedy_takes_the_first() -> None:
    tied = torch.zeros(2, 32_000)
    tied[0, [5, 700, 31_999]] = 1
    assert sample(tied, sampling(), sampling()).token_ids == [5, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = [0.0, 1.0, 2.0, -1.0, 0.5]
    expected = torch.softmax(torch.tensor(logits) / temperature, 0).numpy()
    assert max_difference(shares(drawn(logits, temperature=temperature), 5), expected) < 0.025


def test_draws_of_different_seeds_and_positions_differ() -> None:
    flat = torch.zeros(1000)
    assert len(set(drawn(flat)[:100])) > 80
    assert drawn(flat)[:100] != drawn(flat, seed=8)[:100]


def test_a_draw_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    kinds = [
        sampling(temperature=1.0, seed=3),
        sampling(temperature=0.7, top_p=0.9),
        sampling(temperature=2.0, top_k=2000),
        sampling(),
    ]
    together = sample(logits, *kinds, positions=[5, 6, 7, 8]).token_ids
    alone = [sample(logits[i : i + 1], kinds[i], positions=[5 + i]).token_ids[0] for i in range(4)]
    assert together == alone


def test_a_resumed_request_goes_on_as_it_would_have() -> None:
    logits = [0.0] * 50
    one = sampling(
        temperature=1.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2
    )
    prompt = np.arange(5)
    whole = Sampler()
    resumed = Sampler()
    whole.add("r", one, Stopping(), prompt, [], ())
    expected = outputs(whole, logits, 20)
    resumed.add("r", one, Stopping(), prompt, expected[:8], ())
    assert outputs(resumed, logits, 12, first=8) == expected[8:]


def test_the_hash_is_splitmix64() -> None:
    # The first output for the seed 0 in the reference implementation.
    assert mix(0) == 0xE220A8397B1DCDAF
    states = [0, 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15]
    found = mix_tensor(
        torch.tensor([signed((s + 0x9E3779B97F4A7C15) % 2**64) for s in states])
    ).tolist()
    assert found == [signed(mix(s)) for s in states]


def test_a_key_is_the_hash_of_a_seed_and_then_of_a_position() -> None:
    seeds = [0, 1, 2**63 - 1]
    positions = [0, 9, 2**40]
    expected = [signed(mix(mix(s) + p)) for s, p in zip(seeds, positions, strict=True)]
    assert keys_of(states_of(seeds), positions).tolist() == expected


def test_noise_is_finite_and_within_its_range() -> None:
    noise = gumbel_noise(torch.tensor(signed(mix(1))), torch.arange(1_000_000))
    assert noise.isfinite().all()
    assert noise.max() - noise.min() < NOISE_RANGE
    assert abs(noise.mean() - 0.5772) < 0.01


def test_top_k_leaves_the_best_and_their_equals() -> None:
    assert set(drawn([1.0, 2.0, 3.0, 0.0], top_k=2)) == {1, 2}
    assert set(drawn([1.0, 2.0, 2.0, 0.0], top_k=1)) == {1, 2}
    assert set(drawn([1.0, 2.0, 3.0], top_k=100)) == {0, 1, 2}


def test_top_p_leaves_the_fewest_that_reach_it() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
    assert set(drawn(logits, top_p=0.79)) == {0, 1}
    assert set(drawn(logits, top_p=0.81)) == {0, 1, 2}
    assert set(drawn(logits, top_p=1e-9)) == {0}


def test_top_p_counts_what_top_k_left() -> None:
    logits = np.log([0.4, 0.2, 0.2, 0.2]).tolist()
    # Of the 0.8 that three leave, the first has half.
    assert set(drawn(np.log([0.4, 0.25, 0.15, 0.2]).tolist(), top_k=3, top_p=0.45)) == {0}
    assert set(drawn(logits, top_p=0.45)) == {0, 1, 2, 3}


def test_a_nucleus_may_be_wider_than_the_first_look() -> None:
    falling = torch.linspace(1.0, 0.9, 4 * FIRST_NUCLEUS_WIDTH)
    lowest = threshold(falling[None], [sampling(top_p=0.6)])
    reached = falling.softmax(0).cumsum(0)[falling >= lowest[0]]
    assert reached[-2] < 0.6 <= reached[-1]


def test_rounding_cuts_no_tail_where_there_is_no_top_p() -> None:
    # The second is so improbable that the first alone rounds to 1.
    assert threshold(torch.tensor([[0.0, -20.0, -21.0]]), [sampling(top_k=2)]).item() == -20


def test_min_p_leaves_what_is_near_the_best() -> None:
    logits = np.log([0.6, 0.3, 0.1]).tolist()
    assert set(drawn(logits, min_p=0.4)) == {0, 1}
    assert set(drawn(logits, min_p=0.1)) == {0, 1, 2}


def test_repetition_penalty_counts_prompt_and_output_once() -> None:
    sampler = Sampler()
    sampler.add(
        "r", sampling(repetition_penalty=2.0), Stopping(), np.array([0, 0, 2, 10**9]), [], ()
    )
    # 0 becomes 2.0, 2 becomes -2.0; then 1 becomes 1.5, after which it stays so.
    assert outputs(sampler, [4.0, 3.0, -1.0], 4) == [1, 0, 0, 0]


def test_presence_and_frequency_penalties_count_the_output() -> None:
    sampler = Sampler()
    sampler.add("p", sampling(presence_penalty=1.5), Stopping(), np.array([0]), [], ())
    sampler.add("f", sampling(frequency_penalty=0.6), Stopping(), np.array([0]), [], ())
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    found = [sampler.sample(logits, ["p", "f"], [i, i]).token_ids for i in range(4)]
    assert [p for p, _ in found] == [0, 1, 0, 0]
    assert [f for _, f in found] == [0, 0, 1, 0]


def test_what_would_end_an_answer_waits_for_min_tokens() -> None:
    for ignore_eos, expected in ((False, [2, 2, 0]), (True, [1, 1, 0])):
        sampler = Sampler()
        stopping = Stopping(min_tokens=2, stop_token_ids=(0,), ignore_eos=ignore_eos)
        sampler.add("r", sampling(), stopping, NO_IDS, [], (1,))
        assert outputs(sampler, [3.0, 2.0, 1.0], 3) == expected


@pytest.mark.parametrize(
    "bad", [[1.0, torch.nan, 0.0], [torch.inf, 0.0, 0.0], [-torch.inf] * 3, [torch.nan] * 3]
)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 2, "top_p": 0.5, "repetition_penalty": 1.1},
    ],
)
def test_a_bad_row_fails_alone(bad: list[float], fields: dict[str, float]) -> None:
    good = [0.0, 9.0, 0.0]
    one = sampling(num_logprobs=1, **fields)
    found = sample([good, bad, good], one, one, one)
    assert found.bad_rows == [1]
    assert [found.token_ids[0], found.token_ids[2]] == [1, 1]
    assert set(found.logprobs) == {0, 2}


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]] * 3)
    expected = logits[0].log_softmax(0).numpy()
    found = sample(
        logits,
        sampling(num_logprobs=2, temperature=0.5, top_k=1),
        sampling(),
        sampling(num_logprobs=0),
    ).logprobs
    assert set(found) == {0, 2}
    assert found[0].logprob == pytest.approx(expected[1])
    assert found[0].top_token_ids.tolist() == [1, 2]
    assert max_difference(found[0].top_logprobs, expected[[1, 2]]) < 1e-6
    assert found[2].top_token_ids.shape == (0,)


def test_the_logits_are_not_changed() -> None:
    logits = torch.tensor([[1.0, 3.0]])
    sampler = Sampler()
    sampler.add("r", sampling(repetition_penalty=2.0), Stopping(), np.array([1]), [], ())
    sampler.sample(logits, ["r"], [0])
    assert logits.tolist() == [[1.0, 3.0]]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("penalty", "expected"), [(1.0, "greedy_ids"), (1.05, "greedy_rp105_ids")])
def test_answers_equal_the_reference(name: str, penalty: float, expected: str) -> None:
    case = GoldenCase(name)
    runner = runner_of(case)
    sampler = Sampler()
    sequence = Sequence(case, blocks_of(1)[0])
    sampler.add(
        "r",
        sampling(repetition_penalty=penalty),
        Stopping(ignore_eos=True),
        sequence.token_ids,
        [],
        (),
    )
    token_ids: list[int] = []
    while len(token_ids) < len(case.expected[expected]):
        logits = step(runner, [(sequence, sequence.num_left)])
        token_ids += sampler.sample(torch.from_numpy(logits), ["r"], [len(token_ids)]).token_ids
        sequence.append(token_ids[-1])
    assert token_ids == case.expected[expected]
