"""The language group: continuous batching over a paged KV cache."""

import os
import threading

import torch

from common.checkpoint import open_checkpoint
from common.config import BadSetting
from common.device import prepare
from common.logs import get_logger
from common.member import Member
from common.process import run
from common.settings import LlmSettings
from services.llm.block_pool import BlockPool
from services.llm.engine import Engine
from services.llm.model_runner import ModelRunner
from services.llm.sampler import Sampler
from services.llm.scheduler import Scheduler
from services.llm.worker import Worker

CPU_MEMORY_SHARE = 0.2
ACCELERATOR_MEMORY_SHARE = 0.8


def main(settings: LlmSettings, stop: threading.Event) -> None:
    if settings.tp != 1:
        raise BadSetting(f"--tp {settings.tp}: tensor parallelism is not built yet, use --tp 1")
    checkpoint = open_checkpoint(settings.model)
    max_model_len = settings.max_model_len or checkpoint.max_model_len
    device, dtype = prepare(settings, checkpoint)
    bytes_per_block = ModelRunner.kv_bytes_per_block(checkpoint, dtype, settings.block_size)
    pool = BlockPool(num_blocks(settings, device, bytes_per_block, max_model_len))
    scheduler = Scheduler(pool, settings.block_size, settings.max_num_seqs, settings.max_num_batched_tokens)
    load = lambda: (len(scheduler.running), len(scheduler.waiting))  # noqa: E731
    member = Member(settings, "llm", stop, load, checkpoint.fingerprint, group=settings.name or "llm")
    log = get_logger()
    log.info("loading", id=member.id, model=str(checkpoint.path), dtype=str(dtype), device=str(device), threads=torch.get_num_threads())
    runner = ModelRunner(checkpoint, dtype, device, pool.num_blocks, settings.block_size, progress=member.loading)
    engine = Engine(scheduler, runner, Sampler(), runner.hidden_size, checkpoint.eos_token_ids)
    tokens = pool.num_blocks * settings.block_size
    log.info(
        "ready", id=member.id, kv_cache_mib=pool.num_blocks * bytes_per_block >> 20, kv_cache_tokens=tokens, max_model_len=max_model_len
    )
    member.ready(max_model_len)
    Worker(member, engine).run()
    member.close()


def num_blocks(settings: LlmSettings, device: torch.device, bytes_per_block: int, max_model_len: int) -> int:
    """As many as the memory allows and the batch can use, but at least one whole context.

    Raises
    ------
    BadSetting
        where not even one request of full length fits.
    """
    per_request = -(-max_model_len // settings.block_size)
    memory = settings.kv_memory or available_memory(device)
    blocks = min(memory // bytes_per_block, settings.max_num_seqs * per_request)
    if blocks < per_request:
        raise BadSetting(
            f"{memory} bytes of KV cache hold {blocks * settings.block_size} tokens, one request may have {max_model_len}: "
            f"give --kv-memory {per_request * bytes_per_block} or more, or a smaller --max-model-len"
        )
    return blocks


def available_memory(device: torch.device) -> int:
    """Bytes that the KV cache may take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * ACCELERATOR_MEMORY_SHARE)
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * CPU_MEMORY_SHARE)


if __name__ == "__main__":
    run("llm", __doc__ or "", main)
