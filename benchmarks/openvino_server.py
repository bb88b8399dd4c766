"""An OpenAI endpoint around OpenVINO GenAI, which has none of its own, for `benchmarks.compare`.

It runs in OpenVINO's own virtual environment and imports nothing of Twinlens. It only streams, is
greedy, and accepts one image at most. The comparison asks for no more.
"""

import argparse
import asyncio
import base64
import io
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino
import openvino_genai
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from PIL import Image

IMAGE_MARK = "<ov_genai_image_0>"
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
)
"""Qwen2.5-VL's chat template for one turn, so that every server gets the same prompt."""
MODEL_NAME = "model"
MAX_SEQUENCES = 16
MAX_BATCHED_TOKENS = 2048
KV_GIB = 2

Emit = Callable[[list[int] | None], None]
"""Gets new token ids; None ends the answer."""


@dataclass(frozen=True)
class Job:
    prompt: str
    images: list[Any]
    config: Any
    emit: Emit


class Engine:
    """One thread that steps the pipeline. New requests join between two steps."""

    def __init__(self, model: str, threads: int) -> None:
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._pipeline = make_pipeline(model, threads)
        self.tokenizer = self._pipeline.get_tokenizer()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def _run(self) -> None:
        live: dict[int, tuple[Any, Emit]] = {}
        number = 0
        while True:
            while not live or not self._jobs.empty():
                job = self._jobs.get()
                number += 1
                handle = self._pipeline.add_request(number, job.prompt, job.images, job.config)
                live[number] = (handle, job.emit)
            self._pipeline.step()
            for key, (handle, emit) in list(live.items()):
                # The status is read first: tokens that come after it are read in the next turn.
                has_ended = handle.get_status() != openvino_genai.GenerationStatus.RUNNING
                while handle.can_read():
                    for output in handle.read().values():
                        emit(list(output.generated_ids))
                if has_ended:
                    emit(None)
                    del live[key]


def make_pipeline(model: str, threads: int) -> Any:
    """Return a pipeline in bfloat16 where the processor has it; the weights are not quantised."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = MAX_SEQUENCES
    scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
    scheduler.cache_size = KV_GIB
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = True
    has_bfloat16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = "bf16" if has_bfloat16 else "f32"
    properties = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "ENABLE_CPU_PINNING": False,
    }
    return openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)


def read_messages(messages: list[dict[str, Any]]) -> tuple[str, list[Any]]:
    """Return the prompt and the images, uint8 [1, height, width, 3]."""
    images = []
    content = ""
    for message in messages:
        parts = message["content"]
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            if part["type"] == "text":
                content += part["text"]
                continue
            data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            images.append(openvino.Tensor(np.array(picture)[None]))
            content += IMAGE_MARK
    return PROMPT.format(content=content), images


def read_config(body: dict[str, Any]) -> Any:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = body.get("max_completion_tokens") or body.get("max_tokens") or 64
    config.ignore_eos = bool(body.get("ignore_eos"))
    config.do_sample = False
    config.apply_chat_template = False
    return config


def event(**fields: Any) -> str:
    head = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": int(time.time())}
    return f"data: {json.dumps(head | {'model': MODEL_NAME} | fields)}\n\n"


def make_app(engine: Engine) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL_NAME, "object": "model"}]}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> StreamingResponse:
        body = await request.json()
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[list[int] | None] = asyncio.Queue()
        prompt, images = read_messages(body["messages"])
        emit: Emit = lambda ids: loop.call_soon_threadsafe(news.put_nowait, ids) and None  # noqa: E731
        engine.submit(Job(prompt, images, read_config(body), emit))
        return StreamingResponse(stream(news), media_type="text/event-stream")

    async def stream(news: "asyncio.Queue[list[int] | None]") -> AsyncIterator[str]:
        num_tokens = 0
        while (ids := await news.get()) is not None:
            num_tokens += len(ids)
            delta = {"content": engine.tokenizer.decode(ids)}
            yield event(choices=[{"index": 0, "delta": delta, "finish_reason": None}])
        yield event(choices=[{"index": 0, "delta": {}, "finish_reason": "length"}])
        yield event(choices=[], usage={"completion_tokens": num_tokens})
        yield "data: [DONE]\n\n"

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder that `optimum-cli export openvino` wrote")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    app = make_app(Engine(arguments.model, arguments.threads))
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
