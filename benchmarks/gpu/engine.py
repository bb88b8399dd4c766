"""An engine in the middle of decoding a full batch."""

from functools import partial

import numpy as np

from benchmarks.gpu.setup import Setup
from benchmarks.scheduling import GREEDY
from common.checkpoint import Checkpoint
from common.messages import Peer, Prompt, Stopping
from common.vocabulary import open_vocabulary
from common.wire import Tensor as WireTensor
from services.llm.block_pool import BlockPool
from services.llm.cuda_model_runner import CudaModelRunner
from services.llm.engine import Engine
from services.llm.guided_decoding import GuidedDecoding
from services.llm.sampler import Sampler
from services.llm.scheduler import Scheduler

MAX_STEPS = 1000


def filled_engine(
    runner: CudaModelRunner, checkpoint: Checkpoint, setup: Setup, batch: int, context: int
) -> Engine:
    """Return an engine with `batch` greedy requests of `context` tokens, prefilled.

    Each of its next steps decodes one token of each.
    """
    eos = checkpoint.eos_token_ids
    num_components = checkpoint.family.num_position_components
    engine = Engine(
        Scheduler(BlockPool(setup.num_blocks), setup.block_size, batch, batch * context),
        runner.execute,
        Sampler(),
        GuidedDecoding(partial(open_vocabulary, checkpoint), runner.vocab_size, eos),
        runner.input_width,
        eos,
    )
    for number in range(batch):
        assert engine.add(prompt_of(number, context, num_components))
    engine.step()
    engine.step()
    return engine


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
        stopping=Stopping(max_tokens=MAX_STEPS, ignore_eos=True),
        detokenizer=Peer("detokenizer", "tcp://127.0.0.1:1"),
        timeout=600.0,
        timings=WireTensor.of_text('{"images": []}'),
    )
