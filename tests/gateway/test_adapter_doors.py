"""Adapters at the doors: as models, and loaded and unloaded by clients."""

from typing import Any

import grpc
import pytest
from starlette.testclient import TestClient

from common.events import PeerUp
from common.messages import AdapterChanged
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from tests.fakes import FakeLinks
from tests.gateway.fake_core import FakeCore, grpc_server

ASK = {"messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


class Links(FakeLinks):
    """Answers each load and unload at once."""

    def __init__(self, core: FakeCore) -> None:
        super().__init__()
        self._core = core

    def send(self, peer_id: str, message: Any) -> None:
        super().send(peer_id, message)
        code = "NotFound" if message.name == "unknown" else ""
        answer = AdapterChanged(task=message.task, code=code, reason="there is none")
        self._core.adapters.on_changed(peer_id, answer)


@pytest.fixture
def core() -> FakeCore:
    core = FakeCore()
    peers = core.adapters._peers
    peers.links = Links(core)
    peers.on_peer_up(PeerUp("llm-1", "llm", "ipc:///llm-1"))
    core.adapters._loaded["ocr"] = "/adapters/ocr"
    return core


@pytest.fixture
def client(core: FakeCore) -> TestClient:
    return TestClient(create_app(MeasuredCore(core)))


def test_adapters_are_models_with_a_parent(client: TestClient) -> None:
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["org/tiny", "ocr"]
    assert (models[1]["root"], models[1]["parent"]) == ("/adapters/ocr", "org/tiny")
    assert client.get("/v1/models/ocr").json() == models[1]


@pytest.mark.parametrize(("model", "adapter"), [("ocr", "ocr"), ("org/tiny", "")])
def test_the_model_of_a_request_may_be_an_adapter(
    client: TestClient, core: FakeCore, model: str, adapter: str
) -> None:
    for path, body in (
        (CHAT, ASK),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
    ):
        answer = client.post(path, json=body | {"model": model})
        assert answer.json()["model"] == model, answer.text
        assert core.requests[-1].adapter == adapter


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("load", {"lora_name": "b", "lora_path": "x"}, 200, "'b' added successfully."),
        ("load", {"lora_name": "b", "lora_path": "x", "load_inplace": True}, 200, "added"),
        ("load", {"lora_name": "org/tiny", "lora_path": "x"}, 400, "the served model"),
        ("load", {"lora_name": "b"}, 400, "lora_path: field required"),
        ("load", {"lora_name": "b", "lora_path": "x" * 300}, 400, "at most 240 bytes"),
        ("load", {"lora_name": "b", "lora_path": "x", "is_3d": 1}, 400, "is_3d"),
        ("unload", {"lora_name": "b", "lora_int_id": 3}, 200, "'b' removed successfully."),
        ("unload", {"lora_name": "unknown"}, 404, "there is none"),
        ("unload", {"lora_name": 3}, 400, "lora_name"),
        ("unload", [], 400, "must be a JSON object"),
    ],
)
def test_adapters_are_loaded_and_unloaded_as_in_vllm(
    client: TestClient, path: str, body: Any, status: int, text: str
) -> None:
    answer = client.post(f"/v1/{path}_lora_adapter", json=body)
    assert (answer.status_code, text in answer.text) == (status, True), answer.text


async def test_the_same_over_grpc(core: FakeCore) -> None:
    async with grpc_server(core) as target, grpc.aio.insecure_channel(target) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        await stub.LoadAdapter(inference_pb2.LoadAdapterRequest(name="b", path="x", replace=True))
        await stub.Generate(inference_pb2.GenerateRequest(text="hi", model="b"))
        assert core.requests[-1].adapter == "b"
        await stub.UnloadAdapter(inference_pb2.UnloadAdapterRequest(name="b"))
        for call, asked, code in (
            (stub.UnloadAdapter, inference_pb2.UnloadAdapterRequest(name="unknown"), "NOT_FOUND"),
            (stub.LoadAdapter, inference_pb2.LoadAdapterRequest(name="b"), "INVALID_ARGUMENT"),
            (stub.LoadAdapter, inference_pb2.LoadAdapterRequest(path="b"), "INVALID_ARGUMENT"),
            (stub.Generate, inference_pb2.GenerateRequest(text="hi", model="b"), "NOT_FOUND"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(asked)
            assert caught.value.code().name == code
