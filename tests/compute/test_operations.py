"""Each small operation returns what torch returns, with a C kernel and without."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compute.kernels import library
from compute.kernels.operations import (
    attention,
    can_attend_blocks,
    decode_attention,
    gelu,
    gelu_tanh,
    layer_norm,
    rms_norm,
    rotate,
    silu_mul,
    store_rows,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}
BLOCK_SIZE = 4
NUM_BLOCKS = 60


@pytest.fixture(params=["float32", "bfloat16", "bfloat16 by torch"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    if "by torch" in request.param:
        monkeypatch.setattr("compute.kernels.operations.bfloat16_kernels", lambda: None)
    return torch.float32 if request.param == "float32" else torch.bfloat16


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert ((found.float() - expected).abs() <= TOLERANCE[found.dtype] * (1 + expected.abs())).all()


def softmaxed(q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: float | Tensor = 0.0) -> Tensor:
    """Return the attention of one sequence by its definition: q [Q, H, D], k and v [C, K, D]."""
    k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,chd->hqc", q.float(), k) * q.shape[2] ** -0.5 + bias
    if causal:
        hidden = torch.ones(scores.shape[1:]).triu(len(k) - len(q) + 1).bool()
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("hqc,chd->qhd", scores.softmax(-1), v).flatten(1)


@pytest.mark.parametrize("width", [16, 50, 896])
@pytest.mark.parametrize("num_rows", [1, 40])
def test_rms_norm_and_gate(num_rows: int, width: int, dtype: torch.dtype) -> None:
    x = random(num_rows, width, dtype=dtype)
    weight = random(width, dtype=dtype)
    assert_near(rms_norm(x, weight, 1e-6), F.rms_norm(x.float(), (width,), weight.float(), 1e-6))
    gate_up = 9 * random(num_rows, 2 * width, dtype=dtype)
    gate, up = gate_up.float().chunk(2, -1)
    assert_near(silu_mul(gate_up), F.silu(gate) * up)


@pytest.mark.parametrize("width", [16, 50, 896])
@pytest.mark.parametrize("num_rows", [1, 40])
def test_layer_norm_and_gelu(num_rows: int, width: int, dtype: torch.dtype) -> None:
    x = 3 * random(num_rows, width, dtype=dtype) + 1
    weight, bias = random(2, width, dtype=dtype)
    assert_near(
        layer_norm(x, weight, bias, 1e-6),
        F.layer_norm(x.float(), (width,), weight.float(), bias.float(), 1e-6),
    )
    assert_near(gelu(x), F.gelu(x.float()))
    assert_near(gelu_tanh(x), F.gelu(x.float(), approximate="tanh"))


def test_gates_far_from_zero_neither_overflow_nor_hide_a_nan(dtype: torch.dtype) -> None:
    gate_up = torch.tensor([[1e30, -1e30, -100.0, torch.nan, 1.0, 1.0, 1.0, 1.0]], dtype=dtype)
    found = silu_mul(gate_up)[0]
    assert found[0] > 1e29 and found[1] == 0 and abs(found[2]) < 1e-30 and found[3].isnan()


@pytest.mark.parametrize("head_dim", [32, 80, 128])
def test_rotation_changes_only_the_first_heads(head_dim: int, dtype: torch.dtype) -> None:
    heads = random(7, 5, head_dim, dtype=dtype)
    cos, sin = random(2, 7, head_dim, dtype=torch.float32)
    given = heads.clone()
    rotate(heads, 3, cos, sin)
    turning = given[:, :3].float()
    assert_near(
        heads[:, :3], turning * cos[:, None] + turning.roll(head_dim // 2, -1) * sin[:, None]
    )
    assert heads[:, 3:].equal(given[:, 3:])


@pytest.mark.parametrize(
    ("num_seqs", "query_len", "context_len", "num_heads", "num_kv_heads", "head_dim", "causal"),
    [
        (1, 1, 1, 2, 2, 16, True),
        (1, 100, 100, 6, 2, 64, True),
        (1, 70, 331, 4, 1, 32, True),
        (1, 7, 600, 2, 1, 128, True),
        (5, 33, 33, 3, 3, 80, False),
        (1, 300, 300, 2, 2, 48, False),
        (2, 150, 150, 2, 2, 72, False),
        (1, 270, 270, 2, 2, 104, False),
        (2, 37, 290, 2, 2, 128, False),
        (3, 20, 20, 4, 2, 34, True),
        (2, 9, 9, 2, 2, 10, False),
        (2, 9, 9, 2, 2, 9, False),
    ],
)
def test_attention(
    num_seqs: int,
    query_len: int,
    context_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    causal: bool,
    dtype: torch.dtype,
) -> None:
    q = random(num_seqs * query_len, num_heads + 1, head_dim, dtype=dtype)[:, :num_heads]
    k, v = (
        random(num_seqs * context_len, num_kv_heads + i, head_dim, dtype=dtype)[:, i:]
        for i in (1, 1)
    )
    sequences = zip(q.split(query_len), k.split(context_len), v.split(context_len), strict=True)
    assert_near(
        attention(q, k, v, num_seqs, causal),
        torch.cat([softmaxed(*sequence, causal) for sequence in sequences]),
    )


@pytest.mark.parametrize("head_dim", [34, 64])
@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_attention_with_a_bias_and_hidden_keys(
    has_bias: bool, has_mask: bool, head_dim: int, dtype: torch.dtype
) -> None:
    num_seqs, length, num_heads = 2, 310, 3
    qkv = random(num_seqs * length, 3 * num_heads, head_dim, dtype=dtype)
    bias = None
    if has_bias:  # a part of a larger one
        bias = random(num_heads, length + 9, length + 5, dtype=dtype)[:, 9:, 5:]
    visible = torch.ones(num_seqs, length, dtype=torch.bool)
    if has_mask:
        visible[0, :290] = False  # more than the kernels work on at a time
        visible[1, 5:40] = False
        # A hidden key is not read: it may be anything finite.
        qkv.view(num_seqs, length, 3 * num_heads, head_dim)[0, 0, num_heads:] = 1e18
    q, k, v = qkv.split(num_heads, 1)
    found = attention(q, k, v, num_seqs, bias=bias, visible=visible if has_mask else None)
    sequences = zip(*(x.split(length) for x in (q, k, v)), visible, strict=True)
    added = 0.0 if bias is None else bias.float()
    expected = [
        softmaxed(q, k, v, False, added + torch.zeros(length).masked_fill(~seen, -torch.inf))
        for q, k, v, seen in sequences
    ]
    rows = torch.arange(num_seqs * length) > 0  # the query that was overwritten
    assert_near(found[rows], torch.cat(expected)[rows])


@pytest.mark.parametrize(
    "lengths", [(1, 64, 65, 87), (513, 3, 512, 1400)], ids=["short", "divided"]
)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(14, 2, 64), (16, 1, 32), (3, 3, 128), (8, 2, 96), (2, 2, 256), (9, 1, 256)],
)
def test_decodes_read_blocks_where_they_lie(
    num_heads: int, num_kv_heads: int, head_dim: int, lengths: tuple[int, ...]
) -> None:
    if library.bfloat16_kernels() is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    cache = random(2, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim, dtype=torch.bfloat16)
    contexts = torch.tensor(lengths)
    num_blocks = -(-max(lengths) // BLOCK_SIZE)
    tables = torch.arange(4 * num_blocks).view(4, num_blocks).mul(7).remainder(NUM_BLOCKS - 1)
    cache[:, NUM_BLOCKS - 1] = torch.nan  # belongs to no sequence
    q = random(4, num_heads + 2, head_dim, dtype=torch.bfloat16)[:, 1:-1]
    assert can_attend_blocks(num_heads, cache)
    found = decode_attention(q, cache, tables, contexts)
    for row, table, context in zip(range(4), tables, contexts.tolist(), strict=True):
        k, v = (paged[table].flatten(0, 1)[:context] for paged in cache)
        assert_near(found[row : row + 1], softmaxed(q[row : row + 1], k, v, causal=False))


def test_rows_are_stored_in_their_slots(dtype: torch.dtype) -> None:
    paged = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, 2, 8, dtype=dtype)
    rows = random(3, 5, 8, dtype=dtype)[:, 1:3]
    store_rows(rows, paged, torch.tensor([9, 0, 30]))
    assert paged.flatten(0, 1)[[9, 0, 30]].equal(rows)
    assert paged.flatten(0, 1).count_nonzero() == rows.count_nonzero()


def test_without_a_compiler_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert library.bfloat16_kernels.__wrapped__() is None
