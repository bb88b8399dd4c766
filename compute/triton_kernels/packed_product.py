"""Products with weights of four or eight bits on a card, which are widened as they are read.

A product of few rows is bound by reading its weights, so it reads nothing wider. A product of many
rows widens all weights into a scratch first, and torch multiplies. Untried: no CUDA device was at
hand when this was written.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from compute.triton_kernels.packed_kernels import product_kernel, sum_kernel, widen_kernel
from compute.triton_kernels.tiling import ONE_GROUP, Tiling
from compute.triton_kernels.variant import Variant

OUTPUTS = 64
"""The outputs of a program. Weights are padded to a multiple."""
MAX_KERNEL_ROWS = 256
"""With more rows, widening into a scratch is faster. By arithmetic, for the gate and up products of
a 7B model in four bits on an H200: it takes 80 us, and torch then multiplies 256 rows in 99; the
kernel unpacks all weights again for every 32 rows, 22 us each."""
MAX_PROGRAM_ROWS = 32
"""The rows of a program. More need four warps, for which Triton chooses Hopper's wide matrix
instructions, and these would take the sums of inputs from as many products as those of weights."""
TARGET_PROGRAMS = 768
"""A product is split over its inputs until it has about this number of programs: six for each
multiprocessor of a large card."""
MIN_TILES = 4
"""A split reads at least this number of tiles, so that loads overlap."""
NUM_STAGES = 4
"""The tiles that are loaded ahead, and the one that is multiplied."""
SUM_BLOCK = 512
"""The entries of a program that adds up the sums of splits."""


class PackedProduct:
    """x [n, num_inputs] -> x @ weight.T + bias [n, num_outputs], of packed weights on a card."""

    def __init__(
        self,
        words: Tensor,
        scales: Tensor,
        tiling: Tiling,
        shape: tuple[int, int],
        bias: Tensor | None,
        dtype: torch.dtype,
        factor: float = 1.0,
    ) -> None:
        """Keep what the kernels read.

        Parameters
        ----------
        words
            are int32 [padded outputs, num_tiles * tile / 8] for four bits, or / 4 for eight.
        scales
            are [num_groups, padded outputs]: for four bits int32, a float16 scale below and a
            float16 16 + zero above; for eight bits float32.
        shape
            is (num_outputs, num_inputs).
        bias
            is [num_outputs], of any dtype.
        factor
            is one of all scales.
        """
        device = words.device
        self._words = words
        self._scales = scales
        self._tiling = tiling
        self._bits = 32 * words.shape[1] // len(tiling.positions)
        self._tiles_per_group, self._first = tiling.regularity()
        self._tile_groups = tiling.tile_groups.to(device)
        self._positions = None if tiling.is_natural else tiling.positions.to(device)
        self._bias = None if bias is None else bias.to(device, dtype)
        self._factor = factor
        self._dtype = dtype
        self._tiles_per_split = tiles_per_split(len(words) // OUTPUTS, tiling.num_tiles)
        self._num_splits = triton.cdiv(tiling.num_tiles, self._tiles_per_split)
        self.shape = shape
        self.packed = None
        self.max_kernel_rows = -1

    @property
    def num_bytes(self) -> int:
        """The memory of the weights, with all that belongs to them."""
        kept = (self._words, self._scales, self._tile_groups, self._positions, self._bias)
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [n, num_inputs] -> [n, num_outputs], plus `residual` if given."""
        if not len(x):
            return x.new_empty(0, self.shape[0])
        if self._positions is not None:
            x = F.pad(x, (0, 1)).index_select(1, self._positions)
        if len(x) > MAX_KERNEL_ROWS:
            product = F.linear(x, self.widened()[:, : x.shape[1]], self._bias)
            return product if residual is None else product.add_(residual)
        x = x if x.stride(1) == 1 else x.contiguous()
        return self._multiply(x, None if residual is None else residual.contiguous())

    def _multiply(self, x: Tensor, residual: Tensor | None) -> Tensor:
        num_rows = len(x)
        num_outputs = self.shape[0]
        rows = rows_for(num_rows, x.dtype)
        out = x.new_empty(num_rows, num_outputs)
        is_split = self._num_splits > 1
        sums = out
        if is_split:
            sums = torch.empty(
                self._num_splits, num_rows, num_outputs, dtype=torch.float32, device=x.device
            )
        grid = (triton.cdiv(num_rows, rows), len(self._words) // OUTPUTS, self._num_splits)
        product_kernel[grid](
            x,
            self._words,
            self._scales,
            self._tile_groups,
            self._bias,
            residual,
            sums,
            num_rows,
            num_outputs,
            x.shape[1],
            x.stride(0),
            self._words.shape[1],
            len(self._words),
            self._tiling.num_tiles,
            self._tiles_per_split,
            self._first,
            self._factor,
            OUTPUTS,
            rows,
            self._tiling.tile,
            self._tiles_per_group,
            self._bits,
            x.shape[1] < len(self._tiling.positions),
            is_split,
            precision_of(x.dtype),
            num_warps=warps_for(x.dtype),
            num_stages=NUM_STAGES,
        )
        if is_split:
            self._add_up(sums, residual, out)
        return out

    def _add_up(self, sums: Tensor, residual: Tensor | None, out: Tensor) -> None:
        num_entries = out.numel()
        sum_kernel[(triton.cdiv(num_entries, SUM_BLOCK),)](
            sums,
            self._bias,
            residual,
            out,
            num_entries,
            self.shape[0],
            self._num_splits,
            SUM_BLOCK,
            num_warps=4,
        )

    def widened(self) -> Tensor:
        """Return the weights in the dtype of the product, [num_outputs, num_tiles * tile]."""
        num_outputs = self.shape[0]
        width = len(self._tiling.positions)
        out = torch.empty(num_outputs, width, dtype=self._dtype, device=self._words.device)
        widen_kernel[(len(self._words) // OUTPUTS, self._tiling.num_tiles)](
            self._words,
            self._scales,
            self._tile_groups,
            out,
            num_outputs,
            self._words.shape[1],
            len(self._words),
            width,
            self._factor,
            OUTPUTS,
            self._tiling.tile,
            self._bits,
            num_warps=8,
        )
        return out


def tiles_per_split(num_blocks: int, num_tiles: int) -> int:
    """Return the tiles that a program reads, of a product with this number of blocks of outputs.

    It does not depend on the rows, and so neither does the order of a sum.
    """
    if 2 * num_blocks > TARGET_PROGRAMS:
        # They fill the card, and the sums would only be one launch more.
        return num_tiles
    num_splits = min(triton.cdiv(TARGET_PROGRAMS, num_blocks), num_tiles // MIN_TILES)
    return triton.cdiv(num_tiles, max(1, num_splits))


def rows_for(num_rows: int, dtype: torch.dtype) -> int:
    """Return the rows of a program."""
    # More rows of float32 need more registers than there are.
    most = 8 if dtype is torch.float32 else MAX_PROGRAM_ROWS
    return min(most, max(8, triton.next_power_of_2(num_rows)))


def warps_for(dtype: torch.dtype) -> int:
    """Return the warps of a program."""
    return 8 if dtype is torch.float32 else 2


def precision_of(dtype: torch.dtype) -> str:
    """Return the precision of products: float32 is not to be rounded."""
    return "ieee" if dtype is torch.float32 else "tf32"


def variants() -> Sequence[Variant]:
    """Return the specialisations for a model of 7B."""
    return [variant for bits in (4, 8) for variant in variants_of(bits)]


def variants_of(bits: int) -> Iterator[Variant]:
    name = "int4" if bits == 4 else "fp8"
    for dtype, rows, is_split in (
        ("bf16", 8, True),
        ("bf16", 8, False),
        ("bf16", 16, True),
        ("bf16", 32, True),
        ("fp16", 8, True),
        ("fp32", 8, True),
    ):
        torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
        yield Variant(
            f"{name} product {dtype}, {rows} rows{', split' if is_split else ''}",
            product_kernel,
            signature_of(product_kernel, bits, dtype, is_split),
            {
                "OUTPUTS": OUTPUTS,
                "ROWS": rows,
                "TILE": 128,
                "TILES_PER_GROUP": 1 if bits == 4 else ONE_GROUP,
                "BITS": bits,
                "MASKED": False,
                "IS_SPLIT": is_split,
                "PRECISION": precision_of(torch_dtype),
            },
            num_warps=warps_for(torch_dtype),
            num_stages=NUM_STAGES,
        )
    for dtype in ("bf16", "fp32"):
        yield Variant(
            f"{name} widened {dtype}",
            widen_kernel,
            signature_of(widen_kernel, bits, dtype),
            {"OUTPUTS": OUTPUTS, "TILE": 128, "BITS": bits},
            num_warps=8,
        )
        if bits == 4:
            yield Variant(
                f"sum of splits {dtype}",
                sum_kernel,
                signature_of(sum_kernel, bits, dtype),
                {"BLOCK": SUM_BLOCK},
            )


def signature_of(kernel: Any, bits: int, dtype: str, is_split: bool = False) -> dict[str, str]:
    """Return the types of a kernel's arguments: pointers, constants, and numbers."""
    kinds = dict.fromkeys(("x", "bias", "residual", "out"), f"*{dtype}")
    kinds |= {"words": "*i32", "tile_groups": "*i32", "sums": "*fp32"}
    kinds["factor"] = "fp32"
    kinds["scales"] = "*i32" if bits == 4 else "*fp32"
    if is_split:
        kinds["out"] = "*fp32"
    return {
        name: kinds.get(name, "constexpr" if name.isupper() else "i32") for name in kernel.arg_names
    }
