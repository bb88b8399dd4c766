"""Whether the language groups have all of their KV blocks again.

Prompts that need nearly all blocks run only then.
"""

import asyncio
import random

import grpc

from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc

NUM_REQUESTS = 4
"""So many at once that each of two groups gets some."""
LEAST_TOKEN = 33
MOST_TOKEN = 126
"""The range of tokens that stand for one byte of text each."""
MAX_TOKENS = 8
SECONDS = 90.0


async def blocks_missing(grpc_port: int, num_tokens: int, seed: int) -> list[str]:
    """Return what went wrong with requests of this length, prompt and answer together."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        draw = random.Random(seed)
        requests = [request(draw, num_tokens - MAX_TOKENS) for _ in range(NUM_REQUESTS)]
        answers = await asyncio.gather(
            *(stub.Generate(r, timeout=SECONDS) for r in requests), return_exceptions=True
        )
    return [
        f"a prompt of the whole context: {complaint(answer)}"
        for answer in answers
        if complaint(answer)
    ]


def request(draw: random.Random, num_tokens: int) -> inference_pb2.GenerateRequest:
    """Return a request whose prompt shares no prefix with another."""
    token_ids = [draw.randint(LEAST_TOKEN, MOST_TOKEN) for _ in range(num_tokens)]
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=token_ids),
        sampling=inference_pb2.SamplingParams(temperature=0),
        stopping=inference_pb2.StoppingParams(max_tokens=MAX_TOKENS, ignore_eos=True),
    )


def complaint(answer: object) -> str:
    """Return what is wrong with an answer, or nothing."""
    if isinstance(answer, grpc.aio.AioRpcError):
        return f"{answer.code().name} {answer.details()}"
    if isinstance(answer, BaseException):
        return repr(answer)
    assert isinstance(answer, inference_pb2.GenerateResponse)
    return (
        ""
        if len(answer.token_ids) == MAX_TOKENS
        else f"{len(answer.token_ids)} tokens of {MAX_TOKENS}"
    )
