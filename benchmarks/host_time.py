"""What a decode step costs in Python on the host of a card, without the card.

    python -m benchmarks.host_time [--batch 32] [--steps 300]

The engine, the scheduler, the packing of a step into a graph's inputs, the sampler and the
messages to the detokenizer are real. In place of the forward pass and of the sampling kernels
there is nothing. What the launch of a graph and of three kernels costs the host is not in it.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.scheduling import prompt_of
from common.messages import Sampling, Stopping
from common.progress import Progress
from common.tracing import NO_TRACING
from common.wire import encode
from compute.cuda_graphs import Captured
from compute.triton_kernels import interpreted
from compute.triton_kernels import sampling as kernels
from services.llm.block_pool import BlockPool
from services.llm.decode_graphs import DecodeGraphs
from services.llm.engine import Engine
from services.llm.guided_decoding import GuidedDecoding
from services.llm.sampler import Sampler
from services.llm.scheduler import Scheduler
from services.llm.worker import Worker

VOCAB_SIZE = 512
"""Small, because only a card would compute with logits. Prompts hold tokens below 200."""
CONTEXT = 1024
MAX_CONTEXT = 32_768
NUM_COMPONENTS = 3
STEP_SECONDS = 5e-3
"""A decode step of a model of 7B parameters in bfloat16 on an H200."""
DRAWN = Sampling(temperature=0.7, top_p=0.9, top_k=20, min_p=0.0, repetition_penalty=1.0, seed=3)
PENALISED = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.05)
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)


class Stages:
    """The seconds of each stage of a step, in the order in which they end."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._inside = 0.0

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed without the stages that it calls itself."""

        def call(*args: Any, **kwargs: Any) -> Any:
            outside = self._inside
            self._inside = 0.0
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.thread_time() - began
                self.seconds.setdefault(name, []).append(seconds - self._inside)
                self._inside = outside + seconds

        return call


class NoGraphs:
    """Stands in for the pool of CUDA graphs: a replay computes nothing."""

    def __init__(self, device: torch.device) -> None:
        pass

    def capture(self, compute: Any) -> Captured:
        size = compute.args[0]
        return Captured(lambda: None, torch.zeros(1).expand(size, VOCAB_SIZE))


class NoModel:
    """Stands in for the model of which a graph's inputs know the device."""

    device = torch.device("cpu")


class NoAttention:
    """Stands in for a backend of attention that asks nothing of the host before a replay."""

    def of_decodes(self, num_seqs: int, width: int) -> "NoAttention":
        return self

    def prepare(self, context_lens: np.ndarray, block_tables: np.ndarray) -> None:
        pass


class Links:
    """Encodes messages as if they were sent."""

    def send(self, peer_id: str, message: Any) -> None:
        encode(message)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Take the path of a card, with a kernel that always draws token 1."""

    def choose(scores: Tensor, parameters: Tensor, draws: bool, filters: bool) -> Tensor:
        return torch.ones(len(scores), dtype=torch.int64)

    with interpreted(), mock.patch.object(kernels, "choose", choose):
        yield


def measure(batch: int, steps: int, sampling: Sampling, block_size: int) -> Stages:
    """Return the seconds of the stages of `steps` decode steps."""
    stages = Stages()
    num_blocks = batch * (CONTEXT + steps + 100) // block_size + batch
    graphs = graphs_of(batch, num_blocks, block_size)
    scheduler = Scheduler(BlockPool(num_blocks), block_size, batch, batch * CONTEXT)

    @torch.inference_mode()
    def execute(plan: Any, embeddings: list[Tensor]) -> Tensor:
        if graphs.covers(plan):
            return graphs.run(plan)
        return torch.zeros(1).expand(len(plan.sampled_rows), VOCAB_SIZE)

    engine = Engine(
        scheduler,
        stages.timed("the graph's inputs", execute),
        Sampler(),
        GuidedDecoding(cast(Any, None), VOCAB_SIZE, ()),
        1,
        (),
        num_position_components=NUM_COMPONENTS,
    )
    member = SimpleNamespace(
        links=Links(), progress=Progress(), tracing=NO_TRACING, track_load=lambda load: None
    )
    worker = Worker(cast(Any, member), engine)
    for number in range(batch):
        prompt = prompt_of(number, CONTEXT, NUM_COMPONENTS)
        prompt.sampling = sampling
        prompt.stopping = Stopping(max_tokens=steps + 50, ignore_eos=True)
        engine.add(prompt)
    watch(stages, engine)
    send = stages.timed("messages", worker._send_output_alone)
    step = stages.timed("the rest of the engine", engine.step)
    with without_kernels():
        for number in range(steps + 10):
            if number == 10:
                stages.seconds.clear()
            began = time.thread_time()
            for output in step() or []:
                send(output)
            stages.seconds.setdefault("all", []).append(time.thread_time() - began)
    return stages


def graphs_of(batch: int, num_blocks: int, block_size: int) -> DecodeGraphs:
    with mock.patch("services.llm.decode_graphs.GraphPool", NoGraphs):
        cache = torch.zeros(1).expand(1, 2, num_blocks + 1, block_size, 1, 1)
        return DecodeGraphs(
            cast(Any, NoModel()),
            cast(Any, NoAttention()),
            cache,
            num_blocks,
            MAX_CONTEXT,
            NUM_COMPONENTS,
            [batch],
        )


def watch(stages: Stages, engine: Engine) -> None:
    """Time the parts of a step."""
    scheduler: Any = engine.scheduler
    sampler: Any = engine.sampler
    metrics: Any = engine.metrics
    scheduler.schedule = stages.timed("scheduling", scheduler.schedule)
    scheduler.plan = stages.timed("planning", scheduler.plan)
    scheduler.computed = stages.timed("recording", scheduler.computed)
    sampler.sample = stages.timed("sampling", sampler.sample)
    metrics.observe_step = stages.timed("metrics", metrics.observe_step)


def report(name: str, stages: Stages, steps: int) -> None:
    total = statistics.median(stages.seconds.pop("all"))
    print(f"\n{name}: {total * 1e6:.0f} us a step, {total / STEP_SECONDS:.1%} of 5 ms")
    for stage, seconds in stages.seconds.items():
        per_step = np.array(seconds).reshape(steps, -1).sum(1)
        print(f"    {stage:24} {np.median(per_step) * 1e6:6.0f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, sampling in (("greedy", GREEDY), ("drawn", DRAWN), ("penalised", PENALISED)):
        for block_size in (256, 16):
            stages = measure(options.batch, options.steps, sampling, block_size)
            report(f"{name}, blocks of {block_size} tokens", stages, options.steps)


if __name__ == "__main__":
    main()
