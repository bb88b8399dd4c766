"""How near the engine comes to what a CUDA device can do.

    python -m benchmarks.gpu --checkpoint 7b

Decode is compared with the memory bandwidth, prefill and vision with the rate of matrix products.
The limits are measured in the same run: the best rate of reading and of copying a large buffer, and
of a product of large bfloat16 matrices. Prints a table of medians, and a last line of JSON.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import checkpoints
from common.checkpoint import Checkpoint, open_checkpoint
from common.settings import LlmSettings
from compute.device import Device
from services.llm.attention_backends.choice import choose_attention
from services.llm.cuda_model_runner import CudaModelRunner
from services.llm.families.qwen2_5_vl import TextConfig
from services.llm.parallel import Shard
from services.llm.step_plan import StepPlan
from services.vision.families import load
from services.vision.families.qwen2_5_vl import VisionConfig
from services.vision.graphed_tower import GraphedTower
from services.vision.tower_thread import ItemShape

DTYPE = torch.bfloat16
ROUNDS = 20
WARM_UPS = 3
DECODE_CONTEXT = 512
DECODE_BATCHES = {1: 0.80, 32: 0.65}
"""The sequences of a step, and the wanted share of the limit."""
PREFILLS = (1024, 4096)
PICTURES = {"448x448": (1, 32, 32), "1288x728": (1, 52, 92)}
WANTED_OF_MATRIX_RATE = 0.60
BUFFER_BYTES = 4 << 30
MATRIX_SIZE = 8192


@dataclass(frozen=True)
class Limits:
    bytes_per_second: float
    operations_per_second: float


@dataclass(frozen=True)
class Row:
    case: str
    seconds: float
    share: float
    """The share of the limit named in `limited_by`."""
    limited_by: str
    wanted: float


def median_seconds(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the median time of a run, including all work that it starts on the device."""
    seconds = []
    for _ in range(WARM_UPS + rounds):
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UPS:])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_limits(
    device: torch.device, buffer_bytes: int = BUFFER_BYTES, matrix_size: int = MATRIX_SIZE
) -> Limits:
    buffer = torch.zeros(buffer_bytes // 4, device=device)
    target = torch.empty_like(buffer)
    reading = buffer_bytes / median_seconds(buffer.sum)
    copying = 2 * buffer_bytes / median_seconds(lambda: target.copy_(buffer))
    a, b = torch.randn(2, matrix_size, matrix_size, device=device).to(DTYPE)
    return Limits(max(reading, copying), 2 * matrix_size**3 / median_seconds(lambda: a @ b))


def plan_of(query_lens: Iterable[int], context_len: int, block_size: int) -> StepPlan:
    """Return a plan of sequences with `context_len` tokens each after the step.

    Each sequence has consecutive blocks.
    """
    lens = np.array(list(query_lens), np.int64)
    num_blocks = -(-context_len // block_size)
    tables = np.arange(len(lens) * num_blocks).reshape(len(lens), num_blocks)
    index = np.concatenate([np.arange(context_len - query, context_len) for query in lens])
    seqs = np.repeat(np.arange(len(lens)), lens)
    return StepPlan(
        token_ids=index % 1000,
        positions=np.tile(index, (3, 1)),
        slot_mapping=tables[seqs, index // block_size] * block_size + index % block_size,
        query_lens=lens,
        context_lens=np.full(len(lens), context_len),
        block_tables=tables,
        item_rows=np.zeros(0, np.int64),
        sampled_rows=lens.cumsum() - 1,
        rope_parameters=np.zeros(len(lens), np.int64),
        adapters=np.zeros(len(lens), np.int64),
    )


def num_values(checkpoint: Checkpoint, prefixes: tuple[str, ...]) -> int:
    """Return the number of entries of the matrices whose names begin with one of the prefixes."""
    canonical_name = checkpoint.family.canonical_name
    tensors = ((canonical_name(name), info.shape) for name, info in checkpoint.tensors.items())
    return sum(
        math.prod(shape) for name, shape in tensors if name.startswith(prefixes) and len(shape) > 1
    )


def decode_bytes(checkpoint: Checkpoint, batch: int, context_len: int) -> int:
    """Return the bytes that a decode step must read.

    They are every matrix of layers and head once, and the keys and values of each sequence.
    """
    head = "model.language_model.embed_tokens." if TextConfig.of(checkpoint).tied else "lm_head."
    weights = num_values(checkpoint, ("model.language_model.layers.", head)) * DTYPE.itemsize
    return weights + batch * context_len * CudaModelRunner.kv_bytes_per_block(checkpoint, DTYPE, 1)


def prefill_operations(checkpoint: Checkpoint, num_tokens: int) -> int:
    """Return the operations of a prefill, without its one row of the head and masked scores."""
    sizes = checkpoint.sizes
    attention = 2 * num_tokens**2 * sizes.num_heads * sizes.head_dim * sizes.num_layers
    return 2 * num_tokens * num_values(checkpoint, ("model.language_model.layers.",)) + attention


def vision_operations(checkpoint: Checkpoint, num_patches: int) -> int:
    """Return the operations of an encode; the patch embedding computes the sum of its taps only."""
    config = VisionConfig.of(checkpoint)
    num_full = len(config.fullatt_block_indexes)
    window = (config.window_size // config.patch_size) ** 2
    attention = (
        4
        * num_patches
        * config.hidden_size
        * (num_full * num_patches + (config.depth - num_full) * window)
    )
    blocks, merger, embed = (
        num_values(checkpoint, (f"model.visual.{part}",))
        for part in ("blocks.", "merger.", "patch_embed.")
    )
    return (
        2 * num_patches * (blocks + embed // config.temporal_patch_size)
        + 2 * num_patches // config.merge_unit * merger
        + attention
    )


def of_language(
    checkpoint: Checkpoint, device: torch.device, limits: Limits, attention: str = "auto"
) -> list[Row]:
    """Run a step and choose each sequence's best token; the host waits for it, as in serving."""
    batches = DECODE_BATCHES
    longest = max(PREFILLS)
    chosen = choose_attention(
        LlmSettings(attention=attention), checkpoint, Device(device), DTYPE, Shard()
    )
    block_size = chosen.block_size
    num_blocks = max(max(batches) * -(-DECODE_CONTEXT // block_size), -(-longest // block_size))
    runner = CudaModelRunner(
        checkpoint,
        DTYPE,
        device,
        num_blocks,
        block_size,
        max_num_seqs=max(batches),
        attention=chosen.backend,
    )

    def seconds(plan: StepPlan) -> float:
        return median_seconds(lambda: runner.execute(plan, []).argmax(-1).tolist())

    rows = []
    for batch, wanted in batches.items():
        taken = seconds(plan_of([1] * batch, DECODE_CONTEXT, block_size))
        least = decode_bytes(checkpoint, batch, DECODE_CONTEXT) / limits.bytes_per_second
        rows.append(
            Row(
                f"decode, batch {batch}, {DECODE_CONTEXT} tokens of context",
                taken,
                least / taken,
                "memory",
                wanted,
            )
        )
    for num_tokens in PREFILLS:
        taken = seconds(plan_of([num_tokens], num_tokens, block_size))
        least = prefill_operations(checkpoint, num_tokens) / limits.operations_per_second
        rows.append(
            Row(
                f"prefill of {num_tokens} tokens",
                taken,
                least / taken,
                "products",
                WANTED_OF_MATRIX_RATE,
            )
        )
    return rows


def of_vision(checkpoint: Checkpoint, device: torch.device, limits: Limits) -> list[Row]:
    """Measure encodes from pixels on the host to embeddings on the host.

    The warm-up captures the CUDA graph of each grid.
    """
    tower = GraphedTower(load(checkpoint, DTYPE, device))
    size = VisionConfig.of(checkpoint).patch_size
    rows = []
    for name, grid in PICTURES.items():
        patches = torch.randint(0, 256, (math.prod(grid), 3 * size**2), dtype=torch.uint8)
        shape = ItemShape(grid, (size * grid[1], size * grid[2]))
        taken = median_seconds(lambda x=patches, shape=shape: tower.encode(x, shape).cpu())
        least = vision_operations(checkpoint, len(patches)) / limits.operations_per_second
        rows.append(Row(f"vision, {name}", taken, least / taken, "products", WANTED_OF_MATRIX_RATE))
    return rows


def report(limits: Limits, rows: list[Row], device_name: str, memory_bytes: int) -> None:
    print(f"{device_name}, torch {torch.__version__}, {DTYPE}")
    print(
        f"memory {limits.bytes_per_second / 1e9:.0f} GB/s, products "
        f"{limits.operations_per_second / 1e12:.0f} TFLOPS"
    )
    print(f"\n{'':44} {'ms':>9} {'of the limit':>13} {'wanted':>8}")
    for row in rows:
        print(
            f"{row.case:44} {row.seconds * 1e3:9.2f} {row.share:7.1%} {row.limited_by:>8} "
            f"{row.wanted:6.0%}"
        )
    print(f"\nmost memory in use: {memory_bytes / 1e9:.1f} GB")
    print(
        json.dumps(
            {"device": device_name, "torch": torch.__version__, "memory_bytes": memory_bytes}
            | asdict(limits)
            | {"rows": [*map(asdict, rows)]}
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        default="7b",
        help="mid, 3b or 7b (made if missing), or a model directory",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path.home() / ".cache" / "twinlens" / "checkpoints",
        help="where checkpoints are made",
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device: nothing was measured")
    device = torch.device("cuda")
    checkpoint = open_checkpoint(checkpoints.find(options.checkpoint, options.folder))
    limits = measure_limits(device)
    torch.cuda.empty_cache()
    rows = of_language(checkpoint, device, limits) + of_vision(checkpoint, device, limits)
    report(
        limits, rows, torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    )


if __name__ == "__main__":
    main()
