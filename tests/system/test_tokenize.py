"""The embedded model's tokens, over both APIs; prompts of conversations and of texts over gRPC."""

import json
import urllib.request
from typing import Any

import grpc
import pytest

from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from tests.system.running import RECEIPT, Running, ask_about, fetch

pytestmark = pytest.mark.system
ASK = ask_about(RECEIPT)
STOP = {"type": "function", "function": {"name": "stop"}}
IMAGE = inference_pb2.ContentPart(image=inference_pb2.Placeholder())


def post(system: Running, path: str, **body: Any) -> tuple[int, Any]:
    data = json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    return fetch(urllib.request.Request(system.url(path), data, headers))


def test_tokens_are_those_that_the_model_gets(embedded: Running) -> None:
    for body in ({}, {"tools": [STOP]}, {"messages": [*ASK, {"role": "user", "content": "<|a|>"}]}):
        body = {"messages": ASK, **body}
        status, found = post(embedded, "/tokenize", **body, return_token_strs=True)
        assert status == 200 and found["count"] == len(found["tokens"]) == len(found["token_strs"])
        _, answer = embedded.chat(**body, max_tokens=1, return_token_ids=True)
        assert found["tokens"] == answer["prompt_token_ids"]
        assert found["count"] == answer["usage"]["prompt_tokens"]


def test_text_becomes_tokens_and_text_again(embedded: Running) -> None:
    text = "Grüße, <|im_end|> 你好 <tool_call>\n"
    _, found = post(embedded, "/tokenize", prompt=text)
    assert post(embedded, "/detokenize", tokens=found["tokens"]) == (200, {"prompt": text})
    status, answer = post(embedded, "/detokenize", tokens=[2**30])
    assert status == 400 and "no token" in answer["error"]["message"]


def test_grpc_speaks_of_conversations_and_raw_texts(embedded: Running) -> None:
    image = inference_pb2.Image(data=RECEIPT.read_bytes())
    said = [part["text"] for part in ASK[0]["content"] if part["type"] == "text"]
    parts = [IMAGE, *(inference_pb2.ContentPart(text=text) for text in said)]
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", parts=parts)])
    _, tokens = post(embedded, "/tokenize", messages=ASK)
    _, answer = embedded.chat(ASK, max_tokens=8)
    with grpc.insecure_channel(f"127.0.0.1:{embedded.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        found = stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat, images=[image]))
        assert list(found.token_ids) == tokens["tokens"]
        assert found.max_model_len == tokens["max_model_len"]
        ids = inference_pb2.TokenIds(ids=found.token_ids)
        prompt = stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=ids)).text
        pad = "<|image_pad|>"
        raw = prompt.replace(pad * prompt.count(pad), pad)
        options: Any = {
            "images": [image],
            "sampling": inference_pb2.SamplingParams(temperature=0),
            "stopping": inference_pb2.StoppingParams(max_tokens=8),
        }
        for request in (
            inference_pb2.GenerateRequest(chat=chat, **options),
            inference_pb2.GenerateRequest(raw_text=raw, **options),
        ):
            assert stub.Generate(request).text == answer["choices"][0]["message"]["content"]
