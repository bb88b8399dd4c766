"""How a rank starts: device, control plane, the other ranks, memory, weights, then its work."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from common.adapter_names import adapters_of, parse_adapters
from common.checkpoint import Checkpoint
from common.config import BadSetting
from common.logs import get_logger
from common.member import Member, Profile
from common.metric_aliases import serve_aliases
from common.process import EXIT_FAILED, Stop, leave
from common.progress import LOADING_SECONDS
from common.settings import LlmSettings
from common.sizing import Footprint
from common.vocabulary import open_vocabulary
from compute.device import Device, prepare
from compute.quantization import check_quantization
from services.llm.ascend_model_runner import AscendModelRunner
from services.llm.attention_backends.choice import GATHER, choose_attention, gathering
from services.llm.attention_backends.protocol import PagedBackend
from services.llm.block_pool import BlockPool
from services.llm.cuda_model_runner import CudaModelRunner
from services.llm.draws import compile_kernels
from services.llm.embedding_budget import EmbeddingBudget, embedding_tokens
from services.llm.engine import Engine
from services.llm.grouping import num_ranks_here
from services.llm.guided_decoding import GuidedDecoding
from services.llm.lora_loading import GroupAdapters, RankAdapters
from services.llm.lora_registry import LoraRegistry
from services.llm.metrics import LlmMetrics
from services.llm.model_runner import ModelRunner
from services.llm.parallel import Shard, join_group, names_of_ranks
from services.llm.pooling_engine import PoolingEngine
from services.llm.pooling_runner import PoolingRunner
from services.llm.ranks import StepLimits, follow, lead
from services.llm.sampler import Sampler
from services.llm.scheduler import MAX_SCORED_ROWS, Scheduler
from services.llm.step_plan import StepPlan
from services.llm.worker import Worker

MIN_WHOLE_PROMPTS = 8
"""A step has room for this many of the longest prompts, if the model generates no text."""
LlmMember = Member[Any]
"""Rank 0 handles LlmInbound, the other ranks RankInbound."""


@dataclass(frozen=True, slots=True)
class KvCache:
    """The size of a rank's KV cache."""

    num_blocks: int
    block_size: int
    """Tokens of a block."""
    bytes_per_block: int

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size


class Runner(Protocol):
    """Executes step plans on one rank."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def num_bytes_read(self) -> int: ...

    @property
    def input_width(self) -> int:
        """The width of the rows of items."""
        ...

    def execute(self, plan: StepPlan, embeddings: list[Tensor]) -> Tensor: ...


def generates(checkpoint: Checkpoint) -> bool:
    """Whether the model generates text."""
    return "generate" in checkpoint.family.tasks_of(checkpoint)


def check_settings(settings: LlmSettings, checkpoint: Checkpoint) -> None:
    """Raise BadSetting or BadCheckpoint for what no restart can mend."""
    checkpoint.sizes.check_fits(settings.tp)
    length = settings.max_model_len
    if length and (objection := checkpoint.objection_to_context(length)):
        raise BadSetting(f"--max-model-len {length}: {objection}")
    if not 0 <= settings.rank < settings.tp:
        raise BadSetting(
            f"--rank {settings.rank}: ranks of --tp {settings.tp} count from 0 to {settings.tp - 1}"
        )
    if settings.quantization == "int8" and not generates(checkpoint):
        raise BadSetting("--quantization int8: a model that generates no text has none")
    if settings.quantization == "int8" and checkpoint.quantized:
        raise BadSetting(
            "--quantization int8: the checkpoint is quantized already, so leave the flag out; "
            "--quantization none dequantizes it"
        )
    adapters_of(settings, checkpoint.family, settings.served_model_name)
    if settings.rank > 0 and not settings.rendezvous:
        raise BadSetting(f"--rank {settings.rank} needs --rendezvous, the same for every rank")


def run_rank(settings: LlmSettings, checkpoint: Checkpoint, stop: Stop) -> LlmMember:
    """Start this rank and work until the process must stop. Returns its member, not yet closed."""
    num_sharing = num_ranks_here(settings) * settings.local_groups
    device, dtype = prepare(settings, checkpoint, num_sharing)
    check_quantization(settings.quantization, device.torch_device, dtype)
    device = device.use_card(settings.rank)
    metrics = LlmMetrics()
    member = join_control_plane(settings, checkpoint, stop, metrics)
    log = get_logger().bind(id=member.id)
    log.info(
        "loading",
        model=str(checkpoint.path),
        dtype=str(dtype),
        device=str(device.torch_device),
        threads=torch.get_num_threads(),
    )
    shard, ranks = meet_other_ranks(settings, checkpoint, device, member)
    attention = gathering(settings)
    if generates(checkpoint):
        attention = choose_attention(
            settings, checkpoint, device, dtype, shard, member.progress.tick
        )
    cache = size_cache(
        settings, checkpoint, device, dtype, shard, num_sharing, attention.block_size
    )
    runner = make_runner(
        settings, checkpoint, device, dtype, shard, cache, member, attention.backend
    )
    adapters = None
    residents = []
    if isinstance(runner, ModelRunner) and checkpoint.family.lora_modules:
        adapters = RankAdapters(runner, checkpoint, settings)
        residents = adapters.load_given(parse_adapters(settings.lora), shard)
    log.info(
        "ready",
        weight_mib=runner.num_bytes_read >> 20,
        kv_cache_mib=cache.num_blocks * cache.bytes_per_block >> 20,
        kv_cache_tokens=cache.num_tokens,
        max_model_len=context_of(settings, checkpoint),
    )
    if settings.rank == 0:
        if generates(checkpoint):
            compile_kernels(runner.vocab_size, device.torch_device)
        group_adapters = GroupAdapters(
            LoraRegistry(residents, settings.max_loras),
            adapters,
            settings,
            member,
            frozenset(ranks[1:]),
        )
        run_leader(
            settings,
            checkpoint,
            stop,
            member,
            runner,
            cache,
            dtype,
            ranks,
            metrics,
            group_adapters,
        )
    else:
        # The group drains as one, and ends with rank 0.
        stop.on_drain(member.links.announce_draining)
        member.ready()
        limits = StepLimits(
            runner.vocab_size,
            cache.num_blocks,
            cache.block_size,
            runner.input_width,
            checkpoint.family.num_position_components,
        )
        follow(member, ranks[0], limits, runner.execute, adapters)
    return member


def join_control_plane(
    settings: LlmSettings, checkpoint: Checkpoint, stop: Stop, metrics: LlmMetrics
) -> LlmMember:
    def end_group(reason: str) -> None:
        """End this process with its group.

        The I/O thread calls this, too: the work loop may wait in a collective for the rank that is
        gone, and would wait for ever.
        """
        if not stop.is_set():
            get_logger().error("a rank of the group is gone, so the group ends", reason=reason)
            leave(EXIT_FAILED)

    return Member(
        settings,
        stop,
        Profile(
            role="llm",
            fingerprint=checkpoint.fingerprint,
            group=settings.group,
            rank=settings.rank,
        ),
        on_group_loss=None if settings.tp == 1 else end_group,
        drains=settings.rank == 0,
        registry=metrics.registry,
    )


def meet_other_ranks(
    settings: LlmSettings, checkpoint: Checkpoint, device: Device, member: LlmMember
) -> tuple[Shard, list[str]]:
    """Wait until all ranks of the group have met.

    Returns this rank's share, and the ids of all ranks in their order.
    """
    sizes = checkpoint.sizes
    max_elements = max(
        tokens_of_step(settings, checkpoint) * sizes.hidden_size,
        (settings.max_num_seqs + MAX_SCORED_ROWS) * sizes.vocab_size // settings.tp,
    )
    # Nobody knows when the other ranks come, so this wait is no hang.
    member.progress.idle()
    shard = join_group(
        settings.rank, settings.tp, settings.rendezvous, device.torch_device, max_elements
    )
    ranks = names_of_ranks(member.id, shard, device.torch_device)
    member.meet(ranks)
    member.progress.begin(LOADING_SECONDS)
    return shard, ranks


def context_of(settings: LlmSettings, checkpoint: Checkpoint) -> int:
    """Return the context in tokens, prompt and answer together."""
    return settings.max_model_len or checkpoint.max_model_len


def tokens_of_step(settings: LlmSettings, checkpoint: Checkpoint) -> int:
    """Return the most tokens of a step. Whole prompts cannot fill it up with parts of others."""
    if generates(checkpoint):
        return settings.max_num_batched_tokens
    return max(settings.max_num_batched_tokens, MIN_WHOLE_PROMPTS * checkpoint.max_model_len)


def size_cache(
    settings: LlmSettings,
    checkpoint: Checkpoint,
    device: Device,
    dtype: torch.dtype,
    shard: Shard,
    num_sharing: int,
    block_size: int,
) -> KvCache:
    """Return the size of the KV cache, on which all ranks agree."""
    keeps_quantized = settings.quantization == "auto"
    footprint = Footprint(checkpoint, dtype.itemsize, keeps_quantized)
    num_weight_bytes = footprint.rank_bytes(settings.tp)
    memory = settings.kv_memory or device.kv_cache_bytes(num_sharing, num_weight_bytes)
    bytes_per_block = ModelRunner.kv_bytes_per_block(checkpoint, dtype, block_size, settings.tp)
    max_model_len = context_of(settings, checkpoint)
    num_blocks = count_blocks(
        memory, bytes_per_block, block_size, settings.max_num_seqs, max_model_len
    )
    return KvCache(shard.agree(num_blocks), block_size, bytes_per_block)


def count_blocks(
    memory: int, bytes_per_block: int, block_size: int, max_num_seqs: int, max_model_len: int
) -> int:
    """Return the number of blocks that `memory` allows and the batch can use.

    Raises
    ------
    BadSetting
        if not even one request of full length fits.
    """
    per_request = -(-max_model_len // block_size)
    most = max_num_seqs * per_request
    if bytes_per_block == 0:  # the model keeps no keys and values
        return most
    blocks = min(memory // bytes_per_block, most)
    if blocks < per_request:
        raise BadSetting(
            f"{memory} bytes of KV cache hold {blocks * block_size} tokens, one request may have "
            f"{max_model_len}: give --kv-memory {per_request * bytes_per_block} or more, or a "
            "smaller --max-model-len"
        )
    return blocks


def make_runner(
    settings: LlmSettings,
    checkpoint: Checkpoint,
    device: Device,
    dtype: torch.dtype,
    shard: Shard,
    cache: KvCache,
    member: LlmMember,
    attention: type[PagedBackend] | None,
) -> Runner:
    """Load this rank's weights and allocate its KV cache.

    `attention` is its backend on CUDA; None gathers blocks.
    """
    if not generates(checkpoint):
        return PoolingRunner(checkpoint, dtype, device.torch_device, member.report_loading, shard)
    given = (
        checkpoint,
        dtype,
        device.torch_device,
        cache.num_blocks,
        cache.block_size,
        member.report_loading,
        shard,
    )
    if device.kind == "npu" and settings.attention != GATHER:
        return AscendModelRunner(*given, settings.quantization)
    if device.kind != "cuda":
        return ModelRunner(*given, settings.quantization)
    return CudaModelRunner(
        *given, settings.max_num_seqs, settings.quantization, attention=attention
    )


def run_leader(
    settings: LlmSettings,
    checkpoint: Checkpoint,
    stop: Stop,
    member: LlmMember,
    runner: Runner,
    cache: KvCache,
    dtype: torch.dtype,
    ranks: list[str],
    metrics: LlmMetrics,
    adapters: GroupAdapters,
) -> None:
    """Serve requests as rank 0: schedule steps, and have all ranks execute them."""
    others = frozenset(ranks[1:])
    execute = lead(member, others, runner.execute)
    scheduler = Scheduler(
        BlockPool(cache.num_blocks),
        cache.block_size,
        settings.max_num_seqs,
        tokens_of_step(settings, checkpoint),
    )
    max_model_len = context_of(settings, checkpoint)
    eos_token_ids = checkpoint.eos_token_ids
    guided_decoding = GuidedDecoding(
        partial(open_vocabulary, checkpoint), runner.vocab_size, eos_token_ids
    )
    embedding_bytes = runner.input_width * dtype.itemsize
    budget = EmbeddingBudget(embedding_tokens(cache.num_tokens, max_model_len, embedding_bytes))
    engine = (Engine if generates(checkpoint) else PoolingEngine)(
        scheduler,
        execute,
        Sampler(),
        guided_decoding,
        runner.input_width,
        eos_token_ids,
        budget,
        num_position_components=checkpoint.family.num_position_components,
        max_model_len=max_model_len,
        dtype=dtype,
        prompt_forms=checkpoint.family.prompt_forms(checkpoint),
        metrics=metrics,
        adapters=adapters.registry,
    )
    serve_aliases(metrics, settings, settings.group)
    labels = checkpoint.family.labels(checkpoint)
    worker = Worker(member, engine, stop.drain, others, labels, adapters)
    member.ready(max_model_len)
    worker.run()
