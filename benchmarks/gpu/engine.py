"""An engine in the middle of decoding a full batch."""

from functools import partial

from benchmarks.scheduling import prompt_of
from common.checkpoint import Checkpoint
from common.messages import Stopping
from common.vocabulary import open_vocabulary
from services.llm.block_pool import BlockPool
from services.llm.cuda_model_runner import CudaModelRunner
from services.llm.engine import Engine
from services.llm.guided_decoding import GuidedDecoding
from services.llm.sampler import Sampler
from services.llm.scheduler import Scheduler

MAX_STEPS = 1000


def filled_engine(
    runner: CudaModelRunner,
    checkpoint: Checkpoint,
    num_blocks: int,
    block_size: int,
    batch: int,
    context: int,
) -> Engine:
    """Return an engine with `batch` greedy requests of `context` tokens, prefilled.

    Each of its next steps decodes one token of each.
    """
    eos = checkpoint.eos_token_ids
    num_components = checkpoint.family.num_position_components
    engine = Engine(
        Scheduler(BlockPool(num_blocks), block_size, batch, batch * context),
        runner.execute,
        Sampler(),
        GuidedDecoding(partial(open_vocabulary, checkpoint), runner.vocab_size, eos),
        runner.input_width,
        eos,
    )
    for number in range(batch):
        prompt = prompt_of(number, context, num_components)
        prompt.stopping = Stopping(max_tokens=MAX_STEPS, ignore_eos=True)
        assert engine.add(prompt)
    engine.step()
    engine.step()
    return engine
