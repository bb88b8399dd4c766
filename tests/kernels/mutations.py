"""What `tests.kernels.mutate` changes in the kernels, one line at a time."""

from tests.kernels.mutate import Mutation

POINTWISE = "compute/triton_kernels/pointwise.py"
POINTWISE_TESTS = ("tests/kernels/test_pointwise.py",)


def in_pointwise(kernel: str, *changes: tuple[str, str]) -> list[Mutation]:
    return [Mutation(POINTWISE, kernel, old, new, POINTWISE_TESTS) for old, new in changes]


MUTATIONS = [
    *in_pointwise(
        "add_rms_norm_kernel",
        ("x_ptr + row * x_stride", "x_ptr + row * width"),
        ("delta_ptr + row * delta_stride", "delta_ptr + row * x_stride"),
        ("tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
        (
            "tl.load(x_ptr + row * x_stride + entries, mask=exists, other=0.0)",
            "tl.load(x_ptr + row * x_stride + entries)",
        ),
        (
            "tl.load(delta_ptr + row * delta_stride + entries, mask=exists, other=0.0)",
            "tl.load(delta_ptr + row * delta_stride + entries)",
        ),
        (".to(total_ptr.dtype.element_ty)", ""),
        ("total, mask=exists)", "total)"),
        ("x = total.to(tl.float32)", "pass"),
        ("/ width", "/ BLOCK"),
        (" + eps", ""),
        ("tl.sum(x * x)", "tl.sum(x)"),
        ("tl.rsqrt(", "1.0 / ("),
        ("x * scale * weight, mask=exists)", "x * scale * weight)"),
        ("x * scale * weight,", "x * scale,"),
    ),
    *in_pointwise(
        "silu_mul_kernel",
        ("tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
        ("tl.program_id(1) * BLOCK", "0 * BLOCK"),
        ("row * stride", "row * width * 2"),
        ("gates + width", "gates + BLOCK"),
        ("tl.exp(-gate)", "tl.exp(gate)"),
        ("gate / (1.0", "1.0 / (1.0"),
        ("silu * up,", "silu,"),
        ("silu * up, mask=exists)", "silu * up)"),
    ),
    *in_pointwise(
        "rotate_kernel",
        ("tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
        ("is_entry = entries < HALF", "is_entry = entries < BLOCK"),
        ("row * (2 * HALF)", "row * HALF"),
        ("cos_ptr + table + HALF", "cos_ptr + table"),
        ("signed_sin_ptr + table + HALF", "signed_sin_ptr + table"),
        ("tl.program_id(1) * HEADS", "0 * HEADS"),
        ("(head < num_heads)[:, None] &", ""),
        ("head < num_turning", "head <= num_turning"),
        ("row * row_stride", "row * num_heads * head_stride"),
        ("head[:, None] * head_stride", "head[:, None] * (2 * HALF)"),
        ("y = tl.load(places + HALF", "y = tl.load(places"),
        ("x * cos + y * sin, x)", "x * cos - y * sin, x)"),
        ("y * cos_behind + x * sin_behind", "y * cos_behind + turned_x * sin_behind"),
        ("tl.where(turns, x * cos + y * sin, x)", "x * cos + y * sin"),
        ("tl.where(turns, y * cos_behind + x * sin_behind, y)", "y * cos_behind + x * sin_behind"),
        ("tl.store(places, turned_x, mask=exists & turns)", "pass"),
        ("tl.store(places + HALF, turned_y, mask=exists & turns)", "pass"),
        ("tl.load(slots_ptr + row)", "tl.load(slots_ptr + row).to(tl.int32)"),
        ("slots_ptr + row", "slots_ptr"),
        ("kv_head >= num_kv_heads", "kv_head > num_kv_heads"),
        ("kv_head -= kind.to(tl.int32) * num_kv_heads", "pass"),
        ("slot // block_size * block_stride", "(slot + 1) // block_size * block_stride"),
        ("slot % block_size", "(slot + 1) % block_size"),
        ("kind * kind_stride", "0 * kind_stride"),
        ("kv_head * kv_head_stride", "kv_head * (2 * HALF)"),
        ("exists & (head >= num_queries)[:, None]", "exists"),
        ("tl.store(cached, turned_x, mask=is_kept)", "tl.store(cached, x, mask=is_kept)"),
        ("tl.store(cached + HALF, turned_y, mask=is_kept)", "pass"),
    ),
]
