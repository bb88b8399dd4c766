"""The class of a product follows from its weights, the dtype and what this machine computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compute import products
from compute.int4_linear import Int4Linear
from compute.kernels.library import int8_kernels, portable
from compute.linear import Linear
from compute.products import SideBySideProducts, product_of, product_of_parts
from compute.quantization import Int8Linear
from compute.quantized_weights import Fp8Weight, Int4Weight, QuantizedTensor

BFLOAT16 = torch.bfloat16
SHAPE = (64, 1024)
GROUP = 128
needs_kernels = pytest.mark.skipif(int8_kernels() is None, reason="no AVX2, or no compiler")


def int4(num_outputs: int = SHAPE[0], seed: int = 0) -> Int4Weight:
    random = torch.Generator().manual_seed(seed)
    groups = torch.arange(SHAPE[1]) // GROUP
    shape = (num_outputs, SHAPE[1] // GROUP)
    return Int4Weight(
        torch.randint(0, 16, (num_outputs, SHAPE[1]), dtype=torch.uint8, generator=random),
        torch.rand(shape, generator=random) / 100,
        torch.randint(0, 17, shape, dtype=torch.uint8, generator=random),
        groups if seed == 0 else groups[torch.randperm(len(groups), generator=random)],
    )


def fp8() -> Fp8Weight:
    random = torch.Generator().manual_seed(0)
    values = (100 * torch.randn(SHAPE, generator=random)).to(torch.float8_e4m3fn)
    return Fp8Weight(values, torch.full((SHAPE[0], 1), 0.01), torch.zeros(SHAPE[1]).long())


def rows(dtype: torch.dtype = BFLOAT16) -> Tensor:
    return torch.randn(3, SHAPE[1], generator=torch.Generator().manual_seed(1)).to(dtype)


@needs_kernels
@pytest.mark.parametrize(
    ("weight", "kind", "most"), [(int4(), Int4Linear, 0.35), (fp8(), Int8Linear, 0.6)]
)
def test_a_kernel_multiplies_weights_that_take_little_memory(
    weight: QuantizedTensor, kind: type, most: float
) -> None:
    product = product_of(weight, None, BFLOAT16)
    assert isinstance(product, kind) and product.packed is not None
    expected = F.linear(rows().float(), weight.dequantized())
    assert torch.cosine_similarity(product(rows()).float(), expected).min() > 0.9999
    kept = [part for part in product.packed._kept if isinstance(part, Tensor)]
    num_bfloat16_bytes = 2 * SHAPE[0] * SHAPE[1]
    assert sum(part.nbytes for part in kept) <= most * num_bfloat16_bytes


@pytest.mark.parametrize("weight", [int4(), fp8()])
@pytest.mark.parametrize("reason", ["float16", "no kernels", "portable"])
def test_without_a_kernel_they_are_dequantized_with_a_warning(
    weight: QuantizedTensor, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[int, torch.dtype, str]] = []
    monkeypatch.setattr(products, "warn_of_dequantized", lambda *given: said.append(given))
    dtype = torch.float16 if reason == "float16" else BFLOAT16
    if reason == "no kernels":
        monkeypatch.setattr(products, "int8_kernels", lambda: None)
    if reason == "portable":
        with portable():
            product = product_of(weight, None, dtype)
    else:
        product = product_of(weight, None, dtype)
    assert isinstance(product, Linear)
    assert said == [(4 if isinstance(weight, Int4Weight) else 8, dtype, "cpu")]
    expected = F.linear(rows().float(), weight.dequantized())
    assert torch.cosine_similarity(product(rows(dtype)).float(), expected).min() > 0.9999


def test_the_warning_says_what_it_costs_and_comes_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[dict[str, object]] = []

    class Log:
        def warning(self, event: str, **values: object) -> None:
            said.append(values)

    monkeypatch.setattr(products, "get_logger", Log)
    products.warn_of_dequantized.cache_clear()
    for _ in range(2):
        products.warn_of_dequantized(4, BFLOAT16, "cpu")
        products.warn_of_dequantized(8, BFLOAT16, "npu")
    products.warn_of_dequantized.cache_clear()
    assert [values["memory"] for values in said] == [
        "4 times that of the checkpoint",
        "2 times that of the checkpoint",
    ]


def test_plain_weights_are_rounded_only_if_that_is_asked_for() -> None:
    weight = torch.randn(SHAPE).bfloat16()
    assert type(product_of(weight, None, BFLOAT16)) is Linear
    if int8_kernels() is not None:
        assert type(product_of(weight, None, BFLOAT16, "int8")) is Int8Linear


def test_parts_that_cannot_be_stacked_stand_side_by_side() -> None:
    """Each has its own rows of the bias, and the residual is added to all."""
    weights = [int4(16), int4(8, seed=2), torch.randn(24, SHAPE[1]).bfloat16() / 30]
    bias = torch.randn(48).bfloat16()
    residual = torch.randn(3, 48).bfloat16()
    product = product_of_parts(weights, bias, BFLOAT16)
    assert isinstance(product, SideBySideProducts)
    wide = [w.float() if isinstance(w, Tensor) else w.dequantized() for w in weights]
    expected = F.linear(rows().float(), torch.cat(wide), bias.float())
    for given in (None, residual.clone()):
        wanted = expected if given is None else expected + residual.float()
        found = product(rows(), given).float()
        assert torch.cosine_similarity(found, wanted).min() > 0.9999
    assert not isinstance(product_of_parts([int4(8), int4(16)], None, BFLOAT16), SideBySideProducts)
