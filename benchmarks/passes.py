"""The passes that engine.py times, and the matrix products and attention calls of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle, islice
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.families import ModelSizes
from compute.kernels.operations import attention, attention_by_torch, kernels_for
from compute.linear import Linear, can_pack
from compute.quantization import Int8Linear
from services.llm.attention import GatheredAttention
from services.llm.model_runner import ModelRunner
from services.llm.step_plan import StepPlan
from services.vision.eager_tower import EagerTower
from services.vision.families.qwen2_5_vl import Qwen25VisionTower, VisionConfig
from services.vision.tower_thread import ItemShape
from services.vision.windows import window_order

CPU = torch.device("cpu")
BLOCK_SIZE = 16
BATCHES = (1, 16)
PROMPT_TOKENS = 1000
PICTURES = {"448x448": (32, 32), "1288x728": (52, 92)}
# With more rows a product is bound by arithmetic, and it does not matter where its weights are.
MAX_STREAMING_ROWS = 64
WEIGHTS_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    run: Callable[[], object]
    calls: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """A kind of call that a pass makes `count` times.

    Each of `kernels` makes the call `calls` times when it runs.
    """

    name: str
    count: int
    kernels: dict[str, Callable[[], object]]
    used: str
    calls: int
    num_bytes: int
    num_flops: int
    is_linear: bool


@dataclass(frozen=True, slots=True)
class Pass:
    name: str
    run: Callable[[], object]
    parts: list[Part]

    def cases(self) -> Iterator[Case]:
        yield Case(self.name, self.run)
        for part in self.parts:
            for kernel, run in part.kernels.items():
                yield Case(f"{part.name}/{kernel}", run, part.calls)


def reading(num_bytes: int) -> Case:
    buffer = torch.ones(num_bytes // 8, dtype=torch.int64)
    return Case("read", buffer.sum)


@cache
def weights_of(
    num_outputs: int, num_inputs: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Linear]]:
    """Return weights of one shape, plain and packed.

    Together they exceed the processor's caches, so a kernel reads them from memory.
    """
    count = ceil(WEIGHTS_BYTES / (num_outputs * num_inputs * dtype.itemsize))
    random = torch.Generator().manual_seed(num_outputs)
    plain = [
        torch.randn(num_outputs, num_inputs, generator=random).mul_(num_inputs**-0.5).to(dtype)
        for _ in range(count)
    ]
    return plain, [Linear(weight) for weight in plain]


@cache
def int8_weights_of(num_outputs: int, num_inputs: int) -> list[Int8Linear]:
    plain, _ = weights_of(num_outputs, num_inputs, torch.bfloat16)
    return [Int8Linear(weight) for weight in plain]


def linear_part(
    label: str,
    count: int,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    dtype: torch.dtype,
    quantization: str = "none",
) -> Part:
    plain, laid_out = weights_of(num_outputs, num_inputs, dtype)
    if num_rows > MAX_STREAMING_ROWS:
        plain = plain[:1]
        laid_out = laid_out[:1]
    x = torch.randn(num_rows, num_inputs).to(dtype)
    kernels: dict[str, Callable[[], object]] = {}
    if can_pack(dtype):
        used = "oneDNN"
        kernels |= {
            "torch": lambda: [F.linear(x, weight) for weight in plain],
            used: lambda: [linear.by_onednn(x) for linear in laid_out],
        }
    else:
        # torch emulates the dtype so slowly that its time says nothing about the machine. The
        # float32 kernel of oneDNN is timed instead.
        used = "float32"
        wide_x = x.float()
        wide = weights_of(num_outputs, num_inputs, torch.float32)[1][: len(plain)]
        # Float32 weights are fewer in the same number of bytes, so some are used again.
        kernels[used] = lambda: [
            linear.by_onednn(wide_x) for linear in islice(cycle(wide), len(plain))
        ]
    if num_rows <= laid_out[0].max_kernel_rows:
        used = "ours"
        kernels[used] = lambda: [linear(x) for linear in laid_out]
    calls = len(plain)
    size = num_outputs * num_inputs
    itemsize = dtype.itemsize
    if quantization == "int8":
        used = "int8"
        itemsize = 1
        quantized = int8_weights_of(num_outputs, num_inputs)[: len(plain)]
        kernels = {used: lambda: [linear(x) for linear in quantized]}
    name = f"{label} {num_rows} x {num_inputs} -> {num_outputs}"
    return Part(
        name, count, kernels, used, calls, size * itemsize, 2 * num_rows * size, is_linear=True
    )


def attention_part(
    label: str,
    count: int,
    num_seqs: int,
    length: int,
    num_heads: int,
    num_kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    causal: bool,
) -> Part:
    q, k, v = (
        torch.randn(num_seqs * length, num_heads + 2 * num_kv_heads, dim)
        .to(dtype)
        .split((num_heads, num_kv_heads, num_kv_heads), 1)
    )
    torch_dtype = dtype if can_pack(dtype) else torch.float32
    given = [tensor.to(torch_dtype) for tensor in (q, k, v)]
    kernels: dict[str, Callable[[], object]] = {
        "torch": lambda: attention_by_torch(*given, num_seqs, causal)
    }
    if kernels_for(q) is not None:
        kernels["ours"] = lambda: attention(q, k, v, num_seqs, causal)
    num_flops = 4 * num_seqs * num_heads * length**2 * dim // (2 if causal else 1)
    name = f"{label} {num_seqs} x {length}, {num_heads} heads of {dim}"
    return Part(
        name,
        count,
        kernels,
        list(kernels)[-1],
        1,
        2 * k.numel() * dtype.itemsize,
        num_flops,
        is_linear=False,
    )


def decode_attention_part(
    runner: ModelRunner, plan: StepPlan, sizes: ModelSizes, dtype: torch.dtype
) -> Part:
    kv_cache = runner._kv_cache
    step = GatheredAttention(plan, BLOCK_SIZE, dtype, CPU)
    qkv = torch.randn(plan.num_tokens, sizes.num_heads + 2 * sizes.num_kv_heads, sizes.head_dim).to(
        dtype
    )
    q, k, v = qkv.split((sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads), 1)
    kernels: dict[str, Callable[[], object]] = {
        "used": lambda: [step.run(q, k, v, layer) for layer in kv_cache]
    }
    num_entries = 2 * int(plan.context_lens.sum()) * sizes.num_kv_heads * sizes.head_dim
    num_flops = num_entries * 2 * sizes.num_heads // sizes.num_kv_heads
    name = f"attention {plan.num_tokens} x 1 of {int(plan.context_lens[0])}"
    return Part(
        name,
        sizes.num_layers,
        kernels,
        "used",
        sizes.num_layers,
        num_entries * dtype.itemsize,
        num_flops,
        is_linear=False,
    )


def of_language(
    runner: ModelRunner, sizes: ModelSizes, dtype: torch.dtype, context: int, quantization: str
) -> list[Pass]:
    found = []
    for batch in BATCHES:
        plan = plan_of([1] * batch, [context] * batch)
        parts = [
            *decoder_parts(sizes, sizes.num_layers, batch, batch, dtype, quantization),
            decode_attention_part(runner, plan, sizes, dtype),
        ]
        found.append(Pass(f"decode, batch {batch}", partial(runner.execute, plan, []), parts))
    plan = plan_of([PROMPT_TOKENS], [PROMPT_TOKENS])
    heads = (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim)
    parts = decoder_parts(sizes, sizes.num_layers - 1, PROMPT_TOKENS, 1, dtype, quantization)
    parts.append(
        attention_part("attention", sizes.num_layers, 1, PROMPT_TOKENS, *heads, dtype, causal=True)
    )
    return [
        *found,
        Pass(f"prefill of {PROMPT_TOKENS} tokens", partial(runner.execute, plan, []), parts),
    ]


def decoder_parts(
    sizes: ModelSizes,
    num_whole_layers: int,
    num_rows: int,
    num_sampled: int,
    dtype: torch.dtype,
    quantization: str,
) -> list[Part]:
    """Return the calls of the decoder and the head.

    In the last layer only the attention needs the rows that are not sampled.
    """
    hidden = sizes.hidden_size
    q_size = sizes.num_heads * sizes.head_dim
    inner = sizes.intermediate_size
    after_attention = (
        ("o", hidden, q_size),
        ("gate and up", 2 * inner, hidden),
        ("down", hidden, inner),
    )
    qkv_size = q_size + 2 * sizes.num_kv_heads * sizes.head_dim
    parts = [linear_part("qkv", sizes.num_layers, num_rows, qkv_size, hidden, dtype, quantization)]
    parts += [
        linear_part(label, num_whole_layers, num_rows, n, k, dtype, quantization)
        for label, n, k in after_attention
    ]
    if num_whole_layers < sizes.num_layers:
        last = sizes.num_layers - num_whole_layers
        parts += [
            linear_part(label, last, num_sampled, n, k, dtype, quantization)
            for label, n, k in after_attention
        ]
    return [*parts, linear_part("head", 1, num_sampled, sizes.vocab_size, hidden, dtype)]


def of_vision(tower: Qwen25VisionTower, dtype: torch.dtype, pictures: list[str]) -> list[Pass]:
    encoder = EagerTower(tower)
    found = []
    for name in pictures:
        height, width = PICTURES[name]
        size = tower.config.patch_size
        patches = torch.randint(0, 256, (height * width, 3 * size**2), dtype=torch.uint8)
        shape = ItemShape((1, height, width), (size * height, size * width))
        run = partial(encoder.encode, patches, shape)
        found.append(
            Pass(f"vision encode of {name}", run, vision_parts(tower, height, width, dtype))
        )
    return found


def vision_parts(
    tower: Qwen25VisionTower, height: int, width: int, dtype: torch.dtype
) -> list[Part]:
    c: VisionConfig = tower.config
    rows = height * width
    merged = c.hidden_size * c.merge_unit
    num_full = len(c.fullatt_block_indexes)
    shapes = (
        ("patches", 1, rows, c.hidden_size, c.num_channels * c.patch_size**2),
        ("vision qkv", c.depth, rows, 3 * c.hidden_size, c.hidden_size),
        ("vision proj", c.depth, rows, c.hidden_size, c.hidden_size),
        ("vision gate and up", c.depth, rows, 2 * c.intermediate_size, c.hidden_size),
        ("vision down", c.depth, rows, c.hidden_size, c.intermediate_size),
        ("merger in", 1, rows // c.merge_unit, merged, merged),
        ("merger out", 1, rows // c.merge_unit, c.out_hidden_size, merged),
    )
    parts = [
        linear_part(label, count, num_rows, n, k, dtype) for label, count, num_rows, n, k in shapes
    ]
    heads = (c.num_heads, c.num_heads, c.head_dim)
    parts.append(attention_part("all patches", num_full, 1, rows, *heads, dtype, causal=False))
    _, windows = window_order(
        height // c.spatial_merge_size,
        width // c.spatial_merge_size,
        c.window_size // c.patch_size // 2,
    )
    for count, units in windows:
        parts.append(
            attention_part(
                "windows",
                c.depth - num_full,
                count,
                units * c.merge_unit,
                *heads,
                dtype,
                causal=False,
            )
        )
    return parts


def plan_of(query_lens: list[int], context_lens: list[int]) -> StepPlan:
    """Return a plan of sequences with consecutive blocks; the last token of each is sampled."""
    num_blocks = [-(-context // BLOCK_SIZE) for context in context_lens]
    tables = np.zeros((len(context_lens), max(num_blocks)), np.int64)
    for row, count, first in zip(tables, num_blocks, np.cumsum([0, *num_blocks]), strict=False):
        row[:count] = np.arange(first, first + count)
    index = [
        np.arange(context - query, context)
        for query, context in zip(query_lens, context_lens, strict=True)
    ]
    return StepPlan(
        token_ids=np.arange(sum(query_lens)) % 200,
        positions=np.tile(np.concatenate(index), (3, 1)),
        slot_mapping=np.concatenate(
            [
                row[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE
                for row, i in zip(tables, index, strict=True)
            ]
        ),
        query_lens=np.array(query_lens),
        context_lens=np.array(context_lens),
        block_tables=tables,
        item_rows=np.zeros(0, np.int64),
        sampled_rows=np.cumsum(query_lens) - 1,
        rope_parameters=np.zeros(len(query_lens), np.int64),
        adapters=np.zeros(len(query_lens), np.int64),
    )
