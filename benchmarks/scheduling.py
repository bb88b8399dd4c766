"""What a step of the engine takes besides its forward pass: scheduling, planning, sampling.

Also what it takes to begin several answers to one prompt.
"""

import statistics
import time
from functools import partial

import numpy as np
from torch import Tensor

from common.checkpoint import Checkpoint
from common.messages import Peer, Prompt, Sampling, Sibling, Stopping
from common.vocabulary import open_vocabulary
from common.wire import Tensor as WireTensor
from services.llm.block_pool import BlockPool
from services.llm.engine import Engine
from services.llm.guided_decoding import GuidedDecoding
from services.llm.model_runner import ModelRunner
from services.llm.ranks import Execute
from services.llm.sampler import Sampler
from services.llm.scheduler import Scheduler
from services.llm.step_plan import StepPlan

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
BATCH = 16
STEPS = 20
CHOICES = 8
ROUNDS = 5


def overhead(runner: ModelRunner, checkpoint: Checkpoint, block_size: int, context: int) -> float:
    """Return the share of a decode step at batch 16 that is not the forward pass.

    Only the CPU time of this thread counts, not the time it waits.
    """
    inside = [0.0]

    def execute(plan: StepPlan, embeddings: list[Tensor]) -> Tensor:
        began = time.thread_time()
        logits = runner.execute(plan, embeddings)
        inside[0] += time.thread_time() - began
        return logits

    engine = engine_of(runner, checkpoint, block_size, context, execute)
    for number in range(BATCH):
        engine.add(prompt_of(number, context, checkpoint.family.num_position_components))
    engine.step()
    engine.step()
    inside[0] = 0.0
    began = time.thread_time()
    for _ in range(STEPS):
        engine.step()
    return 1 - inside[0] / (time.thread_time() - began)


def choices(
    runner: ModelRunner, checkpoint: Checkpoint, block_size: int, context: int
) -> list[float]:
    """Return the CPU seconds until the first token of one answer, and those of all of CHOICES.

    Both are medians, timed in turn. Each prompt is new to the prefix cache.
    """
    num_components = checkpoint.family.num_position_components
    seconds: dict[int, list[float]] = {1: [], CHOICES: []}
    for number in range(ROUNDS):
        for n in seconds:
            engine = engine_of(runner, checkpoint, block_size, context, runner.execute)
            prompt = prompt_of(number, context, num_components)
            prompt.siblings = tuple(Sibling(f"{number}.{i}", i) for i in range(1, n))
            began = time.thread_time()
            engine.add(prompt)
            outputs = engine.step() or []
            seconds[n].append(time.thread_time() - began)
            assert len(outputs) == n
    return [statistics.median(each) for each in seconds.values()]


def engine_of(
    runner: ModelRunner, checkpoint: Checkpoint, block_size: int, context: int, execute: Execute
) -> Engine:
    """Return an engine that has room for BATCH prompts of this many tokens in one step."""
    eos = checkpoint.eos_token_ids
    pool = BlockPool(runner._kv_cache.shape[2])
    return Engine(
        Scheduler(pool, block_size, BATCH, BATCH * context),
        execute,
        Sampler(),
        GuidedDecoding(partial(open_vocabulary, checkpoint), runner.vocab_size, eos),
        runner.input_width,
        eos,
    )


def prompt_of(number: int, length: int, num_components: int) -> Prompt:
    return Prompt(
        request_id=f"request-{number}",
        attempt=0,
        gateway_id="gateway",
        token_ids=WireTensor.of(np.random.default_rng(number).integers(0, 200, length)),
        positions=WireTensor.of(np.tile(np.arange(length), (num_components, 1))),
        rope_delta=0,
        placeholders=WireTensor.of(np.zeros((0, 2), np.int64)),
        mm_hashes=WireTensor.of(np.zeros((0, 32), np.uint8)),
        sampling=GREEDY,
        stopping=Stopping(max_tokens=STEPS + 10, ignore_eos=True),
        detokenizer=Peer("detokenizer", "tcp://127.0.0.1:1"),
        timeout=600.0,
        timings=WireTensor.of_text('{"images": []}'),
    )
