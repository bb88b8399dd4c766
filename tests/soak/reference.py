"""The undisturbed answers, and the first token of each at which another answer may differ."""

import asyncio
import math
from dataclasses import dataclass
from typing import Any

import grpc
import torch

from common.messages import Sampling
from compute.noise import gumbel_noise, mix, signed
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from tests.soak.clients import FINISH_REASONS, grpc_fields
from tests.soak.workload import SAMPLED_TOP_K, Call, Question

TIE = 3e-4
"""Two candidates this near may come out either way: another batch moves float32 logits by about
2e-5."""
NUM_CANDIDATES = 20
CONCURRENT = 24
ATTEMPTS_SECONDS = 120.0

Candidates = list[tuple[int, float]]
"""(token id, log-probability), most probable first."""


@dataclass(frozen=True)
class Reference:
    token_ids: list[int]
    text: str
    finish_reason: str
    first_tie: int
    """The number of tokens before the first near tie; of all tokens if there is none."""


async def undisturbed(grpc_port: int, questions: list[Question]) -> dict[Question, Reference]:
    """Return the answers of a system without faults."""
    gate = asyncio.Semaphore(CONCURRENT)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def ask(question: Question) -> Reference:
            async with gate:
                response = await stub.Generate(
                    reference_request(question), timeout=ATTEMPTS_SECONDS
                )
            return reference_of(question, response)

        return dict(zip(questions, await asyncio.gather(*map(ask, questions)), strict=True))


def reference_request(question: Question) -> inference_pb2.GenerateRequest:
    fields = grpc_fields(Call(0, question, "grpc", False, "patient", 0, "PNG"))
    return inference_pb2.GenerateRequest(
        **fields, response=inference_pb2.ResponseOptions(num_logprobs=NUM_CANDIDATES)
    )


def reference_of(question: Question, response: Any) -> Reference:
    steps = [
        [(candidate.token_id, candidate.logprob) for candidate in token.top]
        for token in response.logprobs
    ]
    ties = [n for n, candidates in enumerate(steps) if gap(question, n, candidates) < TIE]
    token_ids = list(response.token_ids)
    assert len(steps) == len(token_ids), f"{len(steps)} steps of {len(token_ids)} tokens"
    return Reference(
        token_ids,
        response.text,
        FINISH_REASONS[response.finish_reason],
        ties[0] if ties else len(token_ids),
    )


def gap(question: Question, position: int, candidates: Candidates) -> float:
    """Return how far the token that wins is ahead of any other that could win.

    If that is less than TIE, another batch may choose another token.
    """
    if not question.temperature:
        return candidates[0][1] - candidates[1][1]
    drawn = scores(question, position, candidates)
    ordered = sorted(drawn[:SAMPLED_TOP_K], reverse=True)
    # The edge of the top-k filter is a choice, too: the candidate next to it may be in or out. That
    # matters if this candidate would win.
    edge = (candidates[SAMPLED_TOP_K - 1][1] - candidates[SAMPLED_TOP_K][1]) / question.temperature
    beyond = max(drawn[SAMPLED_TOP_K - 1], drawn[SAMPLED_TOP_K]) > ordered[0] - TIE
    return min(ordered[0] - ordered[1], edge if beyond else math.inf)


def scores(question: Question, position: int, candidates: Candidates) -> list[float]:
    """Return the score of each candidate, including the noise of its draw."""
    key = signed(mix(mix(Sampling(seed=question.seed).seed) + position))
    token_ids = torch.tensor([token_id for token_id, _ in candidates])
    noise = gumbel_noise(torch.full_like(token_ids, key), token_ids).tolist()
    return [
        logprob / question.temperature + n
        for (_, logprob), n in zip(candidates, noise, strict=True)
    ]
