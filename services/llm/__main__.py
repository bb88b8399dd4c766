"""The language group: continuous batching over a paged KV cache, one process a tensor-parallel
rank."""

import torch

from common.checkpoint import Checkpoint, open_checkpoint
from common.config import BadSetting
from common.logs import get_logger
from common.member import Member
from common.process import EXIT_FAILED, Stop, leave, run
from common.progress import LOADING_SECONDS
from common.settings import LlmSettings
from compute.device import prepare
from compute.quantization import check_quantization
from services.llm.block_pool import BlockPool
from services.llm.embedding_budget import EmbeddingBudget, embedding_tokens
from services.llm.engine import Engine
from services.llm.families.qwen2_5_vl import TextConfig
from services.llm.grouping import num_ranks_here, other_ranks, place
from services.llm.guided_decoding import Guides
from services.llm.model_runner import ModelRunner
from services.llm.parallel import join_group
from services.llm.placement import (
    available_memory,
    default_block_size,
    make_runner,
    use_own_card,
    weight_bytes,
)
from services.llm.ranks import follow, lead
from services.llm.sampler import Sampler
from services.llm.scheduler import Scheduler
from services.llm.worker import Worker


def main(settings: LlmSettings, stop: Stop) -> None:
    settings = place(settings)
    checkpoint = open_checkpoint(settings.model)
    check(settings, TextConfig.of(checkpoint))
    with other_ranks(settings) as settings:
        member = serve(settings, checkpoint, stop)
        stop.set()  # from here on the end of another rank is no loss
    member.close()


def serve(settings: LlmSettings, checkpoint: Checkpoint, stop: Stop) -> Member:
    config = TextConfig.of(checkpoint)
    num_sharing = num_ranks_here(settings) * settings.local_groups
    device, dtype = prepare(settings, checkpoint, num_sharing)
    check_quantization(settings.quantization, device, dtype)
    use_own_card(device, settings.rank)
    block_size = settings.block_size or default_block_size(dtype, device)
    schedulers: list[Scheduler] = []  # none yet: the member tells its load from the first moment on

    def load() -> tuple[int, int]:
        return (
            sum(len(s.running) for s in schedulers),
            sum(len(s.waiting) for s in schedulers),
        )

    on_loss = None if settings.tp == 1 else lambda reason: lose_rank(stop, reason)
    member = Member(
        settings,
        "llm",
        stop,
        load,
        checkpoint.fingerprint,
        group=settings.group,
        rank=settings.rank,
        on_group_loss=on_loss,
        drains=settings.rank == 0,
    )
    log = get_logger().bind(id=member.id)
    log.info(
        "loading",
        model=str(checkpoint.path),
        dtype=str(dtype),
        device=str(device),
        threads=torch.get_num_threads(),
    )
    max_elements = max(
        settings.max_num_batched_tokens * config.hidden_size,
        settings.max_num_seqs * config.vocab_size // settings.tp,
    )
    member.progress.idle()  # the other ranks come when they come
    shard = join_group(settings.rank, settings.tp, settings.rendezvous, device, max_elements)
    member.progress.begin(LOADING_SECONDS)
    max_model_len = settings.max_model_len or checkpoint.max_model_len
    bytes_per_block = ModelRunner.kv_bytes_per_block(checkpoint, dtype, block_size, settings.tp)
    num_weight_bytes = weight_bytes(checkpoint, dtype, settings.tp)
    memory = settings.kv_memory or available_memory(device, num_sharing, num_weight_bytes)
    num_blocks = shard.agree(
        count_blocks(memory, bytes_per_block, block_size, settings.max_num_seqs, max_model_len)
    )
    runner = make_runner(
        checkpoint,
        dtype,
        device,
        num_blocks,
        block_size,
        member.loading,
        shard,
        settings.max_num_seqs,
        settings.quantization,
    )
    tokens = num_blocks * block_size
    log.info(
        "ready",
        weight_mib=runner.num_bytes_read >> 20,
        kv_cache_mib=num_blocks * bytes_per_block >> 20,
        kv_cache_tokens=tokens,
        max_model_len=max_model_len,
    )
    if settings.rank > 0:
        # The group drains as one, and ends with rank 0.
        stop.on_drain(member.links.announce_draining)
        member.ready()
        follow(member, runner.execute)
    else:
        execute = lead(member, settings.tp - 1, runner.execute)
        scheduler = Scheduler(
            BlockPool(num_blocks),
            block_size,
            settings.max_num_seqs,
            settings.max_num_batched_tokens,
        )
        schedulers.append(scheduler)
        member.ready(max_model_len)
        guides = Guides(
            checkpoint.path / "tokenizer.json", config.vocab_size, checkpoint.eos_token_ids
        )
        budget = EmbeddingBudget(
            embedding_tokens(tokens, max_model_len, config.hidden_size * dtype.itemsize)
        )
        engine = Engine(
            scheduler,
            execute,
            Sampler(),
            guides,
            config.hidden_size,
            checkpoint.eos_token_ids,
            budget,
        )
        Worker(member, engine, stop.drain).run()
    return member


def check(settings: LlmSettings, config: TextConfig) -> None:
    """Raises BadSetting or BadCheckpoint for what no start can mend."""
    config.check_divisible(settings.tp)
    if not 0 <= settings.rank < settings.tp:
        raise BadSetting(
            f"--rank {settings.rank}: ranks of --tp {settings.tp} count from 0 to {settings.tp - 1}"
        )
    if settings.rank > 0 and not settings.rendezvous:
        raise BadSetting(f"--rank {settings.rank} needs --rendezvous, the same for every rank")


def lose_rank(stop: Stop, reason: str) -> None:
    """Called on the I/O thread, too: the work loop may wait in a collective for the one that is
    gone, and would for ever."""
    if not stop.is_set():
        get_logger().error("a rank of the group is gone, so the group ends", reason=reason)
        leave(EXIT_FAILED)


def count_blocks(
    memory: int, bytes_per_block: int, block_size: int, max_num_seqs: int, max_model_len: int
) -> int:
    """As many as `memory` allows and the batch can use, but at least one whole context.

    Raises
    ------
    BadSetting
        where not even one request of full length fits.
    """
    per_request = -(-max_model_len // block_size)
    blocks = min(memory // bytes_per_block, max_num_seqs * per_request)
    if blocks < per_request:
        raise BadSetting(
            f"{memory} bytes of KV cache hold {blocks * block_size} tokens, one request may have "
            f"{max_model_len}: "
            f"give --kv-memory {per_request * bytes_per_block} or more, or a smaller "
            "--max-model-len"
        )
    return blocks


if __name__ == "__main__":
    run("llm", __doc__ or "", main)
