"""The layers of a quantized checkpoint multiply by the kernels of cards, on a rank of several."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from common.checkpoint import open_checkpoint
from compute.triton_kernels import interpreted
from compute.triton_kernels.fp8 import CardFp8Linear
from compute.triton_kernels.int4 import CardInt4Linear
from services.llm.decoder import Decoder
from services.llm.families import load
from services.llm.parallel import Shard
from tests.golden import GoldenCase
from tests.kernels import DEVICE
from tests.llm.test_model_runner import CPU
from tests.llm.test_quantized import ONE_OF_EACH
from tests.quantized import FORMATS, cosine, quantize

NUM_ROWS = 3


@pytest.mark.parametrize("format", ONE_OF_EACH)
def test_they_compute_what_the_dequantized_weights_compute(format: str, tmp_path: Path) -> None:
    """A rank of eight has 24 inputs of the MLP: less than a group of inputs, and parts of two."""
    pair = quantize(GoldenCase("c_gqa_tp8"), FORMATS[format], tmp_path)
    shard = Shard(3, 8)
    with interpreted():
        found = load(open_checkpoint(pair.quantized.checkpoint), torch.float16, DEVICE, shard)
    meant = load(open_checkpoint(pair.meant.checkpoint), torch.float32, CPU, shard)
    assert isinstance(found, Decoder) and isinstance(meant, Decoder)
    random = torch.Generator().manual_seed(0)
    for part in ("qkv", "o", "gate_up", "down"):
        product = getattr(found.layers[0], part).product
        assert isinstance(product, CardInt4Linear | CardFp8Linear)
        x = torch.randn(NUM_ROWS, product.shape[1], generator=random)
        expected = getattr(meant.layers[0], part).product(x)
        assert cosine(product(x.half().to(DEVICE)).cpu(), expected) > 0.9999
