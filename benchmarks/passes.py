"""The passes that engine.py times, and the matrix products and attention calls of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle, islice
from math import ceil
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.recording import Attention, Calls, Product, WeightKind, recorded
from common.checkpoint import Checkpoint
from compute.int4_linear import Int4Linear
from compute.kernels.operations import attention, attention_by_torch, kernels_for
from compute.linear import Linear, can_pack
from compute.quantization import Int8Linear
from compute.quantized_weights import Int4Weight
from services.llm import families as llm_families
from services.llm.attention import GatheredAttention
from services.llm.decoder import Decoder, rotary_tables
from services.llm.model_runner import ModelRunner
from services.llm.pooling_model import PooledInput
from services.llm.step_plan import StepPlan
from services.preprocess import families as preprocess_families
from services.vision import families as vision_families
from services.vision.eager_tower import EagerTower
from services.vision.tower_thread import ItemShape

CPU = torch.device("cpu")
BLOCK_SIZE = 16
BATCHES = (1, 16)
POOLING_BATCHES = (1, 4)
TOKEN = 200
"""Any id of an ordinary token."""
PROMPT_TOKENS = 1000
ITEM_TOKENS = 900
"""The tokens of a prompt that are an item's, for models that compute something else for them."""
PICTURES = {"448x448": (448, 448), "1288x728": (728, 1288)}
"""Height and width of pictures as they are sent."""
# With more rows a product is bound by arithmetic, and it does not matter where its weights are.
MAX_STREAMING_ROWS = 64
WEIGHTS_BYTES = 128 * 2**20
GROUP_SIZE = 128


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
def quantized_weights_of(
    num_outputs: int, num_inputs: int, kind: WeightKind
) -> list[Int8Linear] | list[Int4Linear]:
    """Return as many quantized products of one shape as `weights_of` has of bfloat16."""
    plain, _ = weights_of(num_outputs, num_inputs, torch.bfloat16)
    if kind == "int8":
        return [Int8Linear(weight) for weight in plain]
    return [Int4Linear(int4_weight(num_outputs, num_inputs)) for _ in plain]


def int4_weight(num_outputs: int, num_inputs: int) -> Int4Weight:
    """Return random weights in groups as AWQ and GPTQ usually have them."""
    groups = torch.arange(num_inputs) // GROUP_SIZE
    shape = (num_outputs, int(groups[-1]) + 1)
    return Int4Weight(
        torch.randint(16, (num_outputs, num_inputs), dtype=torch.uint8),
        torch.full(shape, 0.2 * num_inputs**-0.5),
        torch.randint(16, shape, dtype=torch.uint8),
        groups,
    )


def linear_part(
    label: str,
    count: int,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    dtype: torch.dtype,
    kind: WeightKind = "plain",
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
    if dtype is torch.float16:
        used = "used"
        kernels[used] = lambda: [linear(x) for linear in laid_out]
    if num_rows <= laid_out[0].max_kernel_rows:
        used = "ours"
        kernels[used] = lambda: [linear(x) for linear in laid_out]
    calls = len(plain)
    size = num_outputs * num_inputs
    num_bytes = size * dtype.itemsize
    if kind != "plain":
        used = kind
        quantized = quantized_weights_of(num_outputs, num_inputs, kind)[: len(plain)]
        num_bytes = quantized[0].packed.num_bytes
        kernels = {used: lambda: [linear(x) for linear in quantized]}
    name = f"{label} {num_rows} x {num_inputs} -> {num_outputs}"
    return Part(name, count, kernels, used, calls, num_bytes, 2 * num_rows * size, is_linear=True)


def attention_part(label: str, count: int, call: Attention, dtype: torch.dtype) -> Part:
    q, k, v = (
        torch.randn(call.num_seqs * length, num_heads, call.dim).to(dtype)
        for length, num_heads in (
            (call.query_len, call.num_heads),
            (call.context_len, call.num_kv_heads),
            (call.context_len, call.num_kv_heads),
        )
    )
    bias = visible = None
    if call.has_bias:
        bias = torch.randn(call.num_heads, call.query_len, call.context_len).to(dtype)
    if call.has_mask:
        visible = torch.ones(call.num_seqs, call.context_len, dtype=torch.bool)
    rest = (call.num_seqs, call.causal)
    torch_dtype = dtype if can_pack(dtype) else torch.float32
    given = [tensor.to(torch_dtype) for tensor in (q, k, v)]
    given_bias = None if bias is None else bias.to(torch_dtype)
    kernels: dict[str, Callable[[], object]] = {
        "torch": lambda: attention_by_torch(*given, *rest, given_bias, visible)
    }
    if kernels_for(q) is not None:
        kernels["ours"] = lambda: attention(q, k, v, *rest, bias, visible)
    num_pairs = call.num_seqs * call.num_heads * call.query_len * call.context_len
    additions = [
        name for name, is_there in (("bias", call.has_bias), ("mask", call.has_mask)) if is_there
    ]
    lengths = f"{call.query_len}"
    if call.query_len != call.context_len:
        lengths += f" of {call.context_len}"
    name = f"{label} {call.num_seqs} x {lengths}, {call.num_heads} heads of {call.dim}"
    return Part(
        " ".join((name, *additions)),
        count,
        kernels,
        list(kernels)[-1],
        1,
        2 * k.numel() * dtype.itemsize,
        4 * num_pairs * call.dim // (2 if call.causal else 1),
        is_linear=False,
    )


def parts_of(calls: Calls, dtype: torch.dtype, prefix: str = "") -> list[Part]:
    """Return the calls that were recorded, as they are timed alone."""
    products = [product_part(prefix, count, each, dtype) for each, count in calls.products.items()]
    return products + [
        attention_part(f"{prefix}attention", count, call, dtype)
        for call, count in calls.attentions.items()
    ]


def product_part(prefix: str, count: int, product: Product, dtype: torch.dtype) -> Part:
    return linear_part(
        prefix + product.label,
        count,
        product.num_rows,
        product.num_outputs,
        product.num_inputs,
        dtype,
        product.kind,
    )


def decode_attention_part(
    runner: ModelRunner, plan: StepPlan, checkpoint: Checkpoint, dtype: torch.dtype
) -> Part:
    sizes = checkpoint.sizes
    kv_cache = runner._kv_cache
    step = GatheredAttention(plan, BLOCK_SIZE, dtype, CPU)
    qkv = torch.randn(plan.num_tokens, sizes.num_heads + 2 * sizes.num_kv_heads, sizes.head_dim).to(
        dtype
    )
    tables = rotary_tables(torch.zeros(plan.num_tokens, sizes.head_dim // 2))
    heads = sizes.num_heads, sizes.num_kv_heads
    kernels: dict[str, Callable[[], object]] = {
        "used": lambda: [step.run(qkv, *heads, tables, None, layer) for layer in kv_cache]
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
    runner: ModelRunner, checkpoint: Checkpoint, dtype: torch.dtype, context: int
) -> list[Pass]:
    """Return the decodes of each batch size, and the prefills."""
    found = []
    num_components = checkpoint.family.num_position_components
    for name, plan in decode_plans(checkpoint, context).items():
        run = partial(runner.execute, plan, [])
        parts = parts_of(calls_of(runner, run), dtype)
        parts.append(decode_attention_part(runner, plan, checkpoint, dtype))
        found.append(Pass(name, run, parts))
    for num_item_rows in (0, ITEM_TOKENS) if has_low_rank(runner) else (0,):
        plan = plan_of([PROMPT_TOKENS], [PROMPT_TOKENS], num_components, num_item_rows)
        embeddings = [torch.randn(num_item_rows, runner.input_width).to(dtype)]
        run = partial(runner.execute, plan, embeddings if num_item_rows else [])
        name = f"prefill of {PROMPT_TOKENS} tokens"
        if num_item_rows:
            name += f", {num_item_rows} an item's"
        found.append(Pass(name, run, parts_of(calls_of(runner, run), dtype)))
    return found


def decode_plans(checkpoint: Checkpoint, context: int) -> dict[str, StepPlan]:
    """Return the plan of a decode of each batch size, by the name of its pass."""
    num_components = checkpoint.family.num_position_components
    return {
        f"decode, batch {batch}": plan_of([1] * batch, [context] * batch, num_components)
        for batch in BATCHES
    }


def calls_of(runner: ModelRunner, run: Callable[[], object]) -> Calls:
    """Return the calls of a step. One that is a single call is recorded as single operations."""
    with patch.object(runner, "_fused_decode", None):
        return recorded(runner._model, run)


def has_low_rank(runner: ModelRunner) -> bool:
    """Whether the model computes something else for the rows of items."""
    model = runner._model
    return isinstance(model, Decoder) and any(
        projection.low_rank is not None
        for layer in model.layers
        for projection in (layer.qkv, layer.o, layer.gate_up, layer.down)
    )


def of_vision(checkpoint: Checkpoint, dtype: torch.dtype, pictures: list[str]) -> list[Pass]:
    """Return the encoding of each picture, as preprocess prepares it for this model."""
    tower = vision_families.load(checkpoint, dtype, CPU)
    encoder = EagerTower(tower)
    found = {}
    for picture in pictures:
        patches, shape = prepared(checkpoint, picture)
        run = partial(encoder.encode, patches, shape)
        _, rows, columns = shape.grid_thw
        name = f"vision, {rows} x {columns} patches"
        if name not in found:
            found[name] = Pass(name, run, parts_of(recorded(tower, run), dtype, "vision "))
    return list(found.values())


def of_pooling(checkpoint: Checkpoint, dtype: torch.dtype) -> list[Pass]:
    """Return the passes of a model whose prompts take one step: an item and the longest text."""
    model = llm_families.load_pooling(checkpoint, dtype, CPU)
    patches, _ = prepared(checkpoint, next(iter(PICTURES)))
    num_tokens = checkpoint.family.max_model_len(checkpoint)
    found = []
    for batch in POOLING_BATCHES:
        given = [PooledInput(torch.full((num_tokens,), TOKEN), patches)] * batch
        run = partial(model.pool, given)
        name = f"one step of {batch} x {num_tokens} tokens"
        found.append(Pass(name, run, parts_of(recorded(model, run), dtype)))
    return found


def prepared(checkpoint: Checkpoint, picture: str) -> tuple[Tensor, ItemShape]:
    """Return the patches of a picture as preprocess prepares it for this model, and their shape."""
    rules = preprocess_families.load(checkpoint)
    size = rules.fitting_size(*PICTURES[picture], 0)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    item = rules.prepare_item("image", pixels)
    return torch.from_numpy(item.patches()), ItemShape(item.grid_thw, item.content_size)


def plan_of(
    query_lens: list[int],
    context_lens: list[int],
    num_components: int,
    num_item_rows: int = 0,
) -> StepPlan:
    """Return a plan of sequences with consecutive blocks; the last token of each is sampled.

    The first `num_item_rows` rows hold embeddings of an item.
    """
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
        positions=np.tile(np.concatenate(index), (num_components, 1)),
        slot_mapping=np.concatenate(
            [
                row[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE
                for row, i in zip(tables, index, strict=True)
            ]
        ),
        query_lens=np.array(query_lens),
        context_lens=np.array(context_lens),
        block_tables=tables,
        item_rows=np.arange(num_item_rows),
        sampled_rows=np.cumsum(query_lens) - 1,
        rope_parameters=np.zeros(len(query_lens), np.int64),
        adapters=np.zeros(len(query_lens), np.int64),
    )
