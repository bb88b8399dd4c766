"""The matrix products that benchmarks/engine.py times."""

import pytest
import torch

from benchmarks import passes
from benchmarks.recording import WeightKind
from compute.kernels.library import int8_kernels


@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_every_kernel_of_a_product_makes_as_many_calls(
    kind: WeightKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds are divided by `calls`: a kernel with fewer calls would seem faster than it is."""
    if kind != "plain" and int8_kernels() is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    num_outputs = 48
    num_inputs = 32
    monkeypatch.setattr(passes, "WEIGHTS_BYTES", 6 * num_outputs * num_inputs * 2)
    part = passes.linear_part("product", 1, 1, num_outputs, num_inputs, torch.bfloat16, kind)
    for run in part.kernels.values():
        found = run()
        assert isinstance(found, list) and len(found) == part.calls == 6
