"""Sampled answers over gRPC, and the gap between the two best candidates of each draw.

If a gap is small, another batch may choose the other token.
"""

from collections.abc import Callable, Iterator

import grpc
import torch

from compute.noise import gumbel_noise, mix, signed
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from tests.system.running import GOLDEN, READY_SECONDS, Running

IMAGES = [GOLDEN / "b_two_images_tied" / "inputs" / name for name in ("left.png", "right.png")]
NUM_CANDIDATES = 20


def sampled_request(n: int, max_tokens: int) -> inference_pb2.GenerateRequest:
    """Return a request whose draws are all among the 20 best tokens.

    It asks for the log-probabilities of these tokens, so that the gap of each draw can be computed.
    """
    return inference_pb2.GenerateRequest(
        text=f"Question {n}.",
        images=[inference_pb2.Image(data=path.read_bytes()) for path in IMAGES],
        sampling=inference_pb2.SamplingParams(
            temperature=1,
            top_p=1,
            top_k=NUM_CANDIDATES,
            min_p=0,
            repetition_penalty=1,
            seed=1000 + n,
        ),
        stopping=inference_pb2.StoppingParams(max_tokens=max_tokens, ignore_eos=True),
        response=inference_pb2.ResponseOptions(num_logprobs=NUM_CANDIDATES),
    )


def sampled_whole(
    system: Running, request: inference_pb2.GenerateRequest
) -> tuple[tuple[list[int], str], float]:
    """Return the answer's token ids and text, and the smallest gap of a draw."""
    answer = generate(system, request)
    gaps = [
        gap_of(entry, request.sampling.seed, position)
        for position, entry in enumerate(answer.logprobs)
    ]
    return (list(answer.token_ids), answer.text), min(gaps)


def generate(
    system: Running, request: inference_pb2.GenerateRequest
) -> inference_pb2.GenerateResponse:
    with grpc.insecure_channel(f"127.0.0.1:{system.grpc_port}") as channel:
        return inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            request, timeout=READY_SECONDS
        )


def sampled_stream(
    system: Running,
    request: inference_pb2.GenerateRequest,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> tuple[list[int], str]:
    """Return the token ids and the text of a streamed answer.

    Calls `on_tokens` with the number of tokens so far. Each delta must begin where the last ended.
    """
    ids: list[int] = []
    texts: list[str] = []
    for delta in deltas(system, request):
        assert delta.offset == len(ids)
        ids += delta.token_ids
        texts.append(delta.text)
        on_tokens(len(ids))
    return ids, "".join(texts)


def deltas(
    system: Running, request: inference_pb2.GenerateRequest
) -> Iterator[inference_pb2.Delta]:
    # The two messages have the same fields with the same numbers.
    streamed = inference_pb2.GenerateStreamRequest.FromString(request.SerializeToString())
    with grpc.insecure_channel(f"127.0.0.1:{system.grpc_port}") as channel:
        for response in inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(
            streamed, timeout=READY_SECONDS
        ):
            if response.HasField("delta"):
                yield response.delta


def gap_of(entry: inference_pb2.TokenLogprob, seed: int, position: int) -> float:
    """Return the gap between the two best sums of log-probability and noise.

    The best sum must be that of the drawn token.
    """
    ids = torch.tensor([top.token_id for top in entry.top])
    key = torch.tensor(signed(mix(mix(seed) + position))).expand(len(ids))
    sums = torch.tensor([top.logprob for top in entry.top]) + gumbel_noise(key, ids)
    first, second = sums.topk(2).values.tolist()
    assert ids[sums.argmax()] == entry.token_id or first - second < 1e-3
    return first - second
