"""One rank's share of a LoRA adapter, laid out for the projections of the decoder.

A projection may be several modules side by side (query, key and value). Their pairs become one: the
A stand below each other, and each B has its own rows and columns of the joint B.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import BadCheckpoint
from common.lora import LoraFiles, LoraPair
from common.tensor_info import TensorInfo
from compute.quantized_weights import padded
from compute.weights import DTYPES
from services.llm.decoder import LayerPairs, LowRank
from services.llm.loading import Bounds


@dataclass(frozen=True, slots=True)
class Rows:
    """A module of which the rank computes some outputs: it needs these rows of B, and A whole."""

    projection: str
    """The field of a Layer."""
    bounds: tuple[Bounds, ...]
    """The rows in the file, in the order of the projection's outputs."""
    offset: int = 0
    """The output of the projection at which they begin."""

    @property
    def end(self) -> int:
        """The output of the projection after the last one."""
        return self.offset + sum(bounds.length for bounds in self.bounds)


@dataclass(frozen=True, slots=True)
class Columns:
    """A module of which the rank has some inputs: it needs these columns of A, and B whole.

    The results are parts of a sum, as those of the weight are.
    """

    projection: str
    bounds: Bounds


LoraTarget = Rows | Columns


def read_layers(
    files: LoraFiles,
    targets: dict[str, LoraTarget],
    num_layers: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[LayerPairs]:
    """Return what an adapter adds to each layer on one rank.

    Raises
    ------
    BadCheckpoint
        if a value is not finite in the dtype of the model.
    """
    reader = PairReader(files, targets, dtype, device)
    by_place: dict[tuple[int, str], list[LoraPair]] = defaultdict(list)
    for pair in files.pairs:
        by_place[pair.layer, targets[pair.module].projection].append(pair)
    fields: list[dict[str, LowRank]] = [{} for _ in range(num_layers)]
    for (layer, projection), pairs in by_place.items():
        fields[layer][projection] = reader.joined(projection, pairs)
    return [LayerPairs(**given) for given in fields]


class PairReader:
    """Reads pairs from the bytes of an adapter's file."""

    def __init__(
        self,
        files: LoraFiles,
        targets: dict[str, LoraTarget],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._files = files
        self._targets = targets
        self._dtype = dtype
        self._device = device

    def joined(self, projection: str, pairs: list[LoraPair]) -> LowRank:
        """Return the pairs of the modules of one projection as one pair."""
        if isinstance(self._targets[pairs[0].module], Columns):
            (pair,) = pairs
            target = self._targets[pair.module]
            assert isinstance(target, Columns)
            down = cut(self._tensor(pair.a), 1, target.bounds)
            return self._pair(down, self._tensor(pair.b) * pair.scale)
        targets = (t for t in self._targets.values() if t.projection == projection)
        num_outputs = max(target.end for target in targets if isinstance(target, Rows))
        downs = [self._tensor(pair.a) for pair in pairs]
        up = torch.zeros(num_outputs, sum(map(len, downs)))
        column = 0
        for pair in pairs:
            target = self._targets[pair.module]
            assert isinstance(target, Rows)
            whole = self._tensor(pair.b) * pair.scale
            own = torch.cat([cut(whole, 0, bounds) for bounds in target.bounds])
            up[target.offset : target.end, column : column + own.shape[1]] = own
            column += own.shape[1]
        return self._pair(torch.cat(downs), up)

    def _tensor(self, info: TensorInfo) -> Tensor:
        """Return a tensor of the file in float32."""
        dtype = DTYPES[info.dtype]
        item = np.dtype(f"i{dtype.itemsize}")
        stored = np.frombuffer(self._files.data, item, prod(info.shape), info.offset)
        return torch.from_numpy(stored.reshape(info.shape).copy()).view(dtype).float()

    def _pair(self, down: Tensor, up: Tensor) -> LowRank:
        placed = [part.to(self._device, self._dtype) for part in (down, up)]
        if not all(bool(part.isfinite().all()) for part in placed):
            raise BadCheckpoint(
                f"{self._files.path}: the adapter has a value that is not finite in {self._dtype}"
            )
        return LowRank(*placed)


def cut(whole: Tensor, dim: int, bounds: Bounds) -> Tensor:
    """Return the part of a rank along a dimension, with the zeros that follow it."""
    part = whole.narrow(dim, bounds.first, bounds.last - bounds.first)
    return padded(part, dim, bounds.num_zeros)
