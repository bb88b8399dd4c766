"""Draws on the card equal those of the sampler on the CPU, and fetch their results once."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import triton
import triton.language as tl

from common.messages import Sampling, Stopping, TokenRules
from common.wire import Tensor as WireTensor
from compute.noise import gumbel_noise
from compute.triton_kernels import interpreted, sampling, sampling_kernels
from services.llm import draws
from services.llm.sampler import SampledTokens, Sampler
from tests.kernels import DEVICE

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")
"""The operations that wait for the device."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split even short rows, and search them in few passes: the interpreter is slow."""
    monkeypatch.setattr(sampling, "PART", 256)
    monkeypatch.setattr(sampling, "TALLY_CHUNK", 128)
    monkeypatch.setattr(sampling, "CHUNK", 128)
    monkeypatch.setattr(sampling, "NUM_PIVOTS", 128)


def sampling_of(**fields: Any) -> Sampling:
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 5}
    return Sampling(repetition_penalty=1.0, **neutral | fields)


def both(scores: Tensor, samplings: list[Sampling]) -> tuple[list[int], list[int]]:
    """Return the tokens that the CPU draws and those of the kernels."""
    are_greedy = [s.temperature == 0 for s in samplings]
    positions = list(range(len(scores)))
    expected = draws.choose(scores, samplings, are_greedy, positions)
    on_card = draws.CardDraws(samplings, are_greedy, scores.shape[1])
    found = on_card.choose(scores.to(DEVICE), positions)
    return expected.tolist(), found.tolist()


def random_rows(num_rows: int, vocab_size: int, seed: int) -> Tensor:
    """Return rows of peaked and flat distributions, some with many ties."""
    rng = np.random.default_rng(seed)
    spread = rng.choice([0.1, 1.0, 3.0, 8.0], (num_rows, 1))
    scores = rng.standard_normal((num_rows, vocab_size)) * spread
    scores[::5] = scores[::5].round()
    return torch.from_numpy(scores.astype(np.float32))


def random_samplings(count: int, vocab_size: int, **choices: list[Any]) -> list[Sampling]:
    rng = np.random.default_rng(count)
    return [
        sampling_of(
            seed=int(rng.integers(0, 2**63)),
            **{name: rng.choice(values).item() for name, values in choices.items()},
        )
        for _ in range(count)
    ]


def test_draws_without_filters_equal_those_of_the_cpu() -> None:
    samplings = random_samplings(
        60, 300, temperature=[0.0, 0.3, 1.0, 2.5], min_p=[0.0, 0.0, 0.01, 0.3, 1.0]
    )
    expected, found = both(random_rows(60, 300, 1), samplings)
    assert found == expected
    assert len(set(expected)) > 25


@pytest.mark.parametrize("vocab_size", [200, 257, 1000])
def test_draws_with_filters_equal_those_of_the_cpu(vocab_size: int) -> None:
    samplings = random_samplings(
        12,
        vocab_size,
        temperature=[0.0, 0.7, 1.0, 1.5],
        top_k=[0, 1, 2, 20, vocab_size - 1, vocab_size, vocab_size + 7],
        top_p=[0.0, 1e-9, 0.1, 0.5, 0.95, 0.999, 1.0],
        min_p=[0.0, 0.0, 0.05],
    )
    expected, found = both(random_rows(12, vocab_size, vocab_size), samplings)
    assert found == expected


def thresholds_of(scores: Tensor, samplings: list[Sampling]) -> tuple[list[float], list[float]]:
    """Return the thresholds of the CPU and those of the kernels."""
    captured = []
    find = sampling.find_thresholds

    def find_and_keep(*args: Tensor) -> Tensor:
        captured.append(find(*args))
        return captured[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sampling, "find_thresholds", find_and_keep)
        both(scores, samplings)
    temperatures = torch.tensor([[s.temperature] for s in samplings])
    expected = draws.threshold(scores / temperatures, samplings)
    return expected[:, 0].tolist(), captured[0].tolist()


def test_thresholds_equal_those_of_the_cpu() -> None:
    samplings = random_samplings(
        10, 600, temperature=[0.7, 1.3], top_k=[0, 3, 50, 599], top_p=[0.2, 0.9, 1.0]
    )
    expected, found = thresholds_of(random_rows(10, 600, 9), samplings)
    assert found == expected


def test_a_filter_may_keep_more_than_noise_reaches() -> None:
    scores = torch.linspace(0.0, -90.0, 300)[None]
    expected, found = thresholds_of(scores, [sampling_of(top_k=200)])
    assert found == expected == [-26.0]


def test_equal_scores_are_kept_together() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0, 0.0, -0.0]).repeat(60)[None]
    for fields in ({"top_k": 1}, {"top_k": 150}, {"top_p": 0.3}, {"top_k": 121, "top_p": 0.99}):
        expected, found = thresholds_of(scores, [sampling_of(**fields)])
        assert found == expected


def test_of_equal_scores_greedy_takes_the_first() -> None:
    scores = torch.zeros(3, 1000)
    scores[0, [700, 300, 999]] = 1
    scores[1, 999] = 1
    assert both(scores, [sampling_of(temperature=0.0)] * 3)[1] == [300, 999, 0]


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {}, {"top_k": 5, "top_p": 0.5}])
def test_bad_rows_have_no_token(fields: dict[str, float]) -> None:
    scores = random_rows(7, 600, 3)
    scores[1, 400] = torch.nan
    scores[2, 400] = torch.inf
    scores[3] = -torch.inf
    scores[4] = torch.nan
    scores[5] = -torch.inf
    scores[5, 599] = -3.0
    expected, found = both(scores, [sampling_of(**fields)] * 7)
    assert found == expected
    assert found[1:6] == [-1, -1, -1, -1, 599]
    assert found[0] >= 0 and found[6] >= 0


def test_a_whole_vocabulary_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PART", 4096), ("TALLY_CHUNK", 128), ("CHUNK", 1024)):
        monkeypatch.setattr(sampling, name, value)
    scores = torch.randn(1, 152_064, generator=torch.Generator().manual_seed(2)) * 3
    expected, found = both(scores, [sampling_of(top_p=0.9, top_k=50)])
    assert found == expected


@triton.jit
def noise_of(keys, noise, SIZE: tl.constexpr):
    token = tl.arange(0, SIZE)
    key = tl.load(keys + tl.program_id(0)).to(tl.uint64, bitcast=True)
    tl.store(noise + tl.program_id(0) * SIZE + token, sampling_kernels.gumbel_noise(key, token))


def test_kernels_are_compiled_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(sampling, "choose", lambda *args: given.append(args))
    draws.compile_kernels(300, torch.device("cpu"))
    assert given == []
    with interpreted():
        draws.compile_kernels(300, torch.device("cpu"))
    assert [(len(scores), *flags) for scores, _, *flags in given] == [
        (1, True, True),
        (1, True, False),
    ]


def test_noise_is_that_of_the_cpu() -> None:
    keys = torch.tensor([0, -1, 2**62 + 3, -(2**63)])
    found = torch.empty(4, 4096, device=DEVICE)
    noise_of[(4,)](keys.to(DEVICE), found, 4096)
    expected = gumbel_noise(keys[:, None], torch.arange(4096))
    assert (found.cpu() - expected).abs().max() < 4e-6


@triton.jit
def logs_of(numbers, logs, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(logs + at, sampling_kernels.log_of(tl.load(numbers + at)))


def test_the_logarithm_is_precise_where_noise_is_largest() -> None:
    numbers = torch.cat((torch.logspace(-10, 2, 4032), 1 - torch.arange(64) * 2.0**-24))
    logs = torch.empty(4096, device=DEVICE)
    logs_of[(1,)](numbers.to(DEVICE), logs, 4096)
    exact = numbers.double().log()
    error = ((logs.cpu() - exact).abs() / exact.abs().clamp(min=1e-7)).max()
    assert error < 4e-7


class Waits(TorchDispatchMode):
    """Counts the operations that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        places = args[1] if name in ("index", "index_put_", "index_put") else ()
        by_mask = any(place is not None and place.dtype == torch.bool for place in places)
        if name in WAITING or by_mask:
            self.found.append(name)
        return func(*args, **kwargs or {})


def sample_all_kinds(device: torch.device) -> SampledTokens:
    """One step of requests with everything that a request can ask of the sampler."""
    sampler = Sampler()
    ids = np.array([3, 9, 40])
    rules = TokenRules(
        bias_token_ids=WireTensor.of(ids),
        bias_values=WireTensor.of(np.array([2.0, -100.0, 100.0], np.float32)),
        allowed_token_ids=WireTensor.of(np.arange(30, 90)),
        no_repeat_ngram_size=2,
    )
    kinds = [
        (sampling_of(temperature=0.0), None),
        (sampling_of(top_k=5, top_p=0.9, num_logprobs=3), None),
        (sampling_of(temperature=0.0, num_logprobs=0), rules),
        (sampling_of(presence_penalty=1.0, frequency_penalty=0.5, min_p=0.1), None),
        (sampling_of(temperature=0.5), None),
    ]
    for key, (one, its_rules) in enumerate(kinds):
        sampler.add(key, one, Stopping(min_tokens=9), ids, [4, 5, 4], (7,), its_rules)
    logits = random_rows(5, 600, 21)
    logits[4, 3] = torch.nan
    return sampler.sample(logits.to(device), list(range(5)), [3] * 5, {0: np.arange(600) > 500})


def test_a_step_fetches_its_results_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    cpu = Tensor.cpu

    def counting(self: Tensor) -> Tensor:
        fetched.append(self.shape)
        return cpu(self)

    expected = sample_all_kinds(torch.device("cpu"))
    monkeypatch.setattr(Tensor, "cpu", counting)
    # Only a row without a token is looked at once more.
    monkeypatch.setattr("services.llm.sampler.is_ruled_out", lambda logits, scores: False)
    with interpreted(), Waits() as waits:
        found = sample_all_kinds(DEVICE)
    assert len(fetched) == 1
    assert waits.found == []
    assert found.token_ids == expected.token_ids
    assert found.bad_rows == expected.bad_rows == [4]
    assert set(found.logprobs) == {1, 2}
    for row, logprobs in found.logprobs.items():
        assert logprobs.logprob == pytest.approx(expected.logprobs[row].logprob, abs=1e-5)
        assert logprobs.top_token_ids.tolist() == expected.logprobs[row].top_token_ids.tolist()
