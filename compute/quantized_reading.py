"""Reads a rank's part of quantized weights from the layouts of their files.

A part may begin anywhere: within an int32 of eight values, and within a group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.checkpoint import BadCheckpoint
from common.quantized_weights import NIBBLES, QuantizedWeight
from common.tensor_info import TensorInfo
from compute.quantized_weights import Fp8Weight, Int4Weight, QuantizedTensor

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where an int32 of an AWQ checkpoint has each of eight outputs, in units of four bits."""
IN_ORDER = tuple(range(NIBBLES))
MIDDLE = 8
"""The value that means zero if no zero points are stored."""

ReadStored = Callable[[TensorInfo, tuple[slice, ...]], Tensor]
"""Returns a part of a tensor in a file."""


def read_part(
    weight: QuantizedWeight,
    shape: tuple[int, int],
    index: Sequence[slice],
    read_stored: ReadStored,
    device: torch.device,
) -> QuantizedTensor:
    """Return a part of weights [num_outputs, num_inputs].

    `index` is the slice of each dimension; all of those that are missing.

    Raises
    ------
    BadCheckpoint
        if an input has a group that does not exist.
    """
    rows, columns = (
        range(size)[cut]
        for size, cut in zip(shape, (*index, slice(None), slice(None)), strict=False)
    )
    return PartReader(weight, rows, columns, read_stored, device).read()


@dataclass(frozen=True, slots=True)
class PartReader:
    """Reads some outputs and some inputs of quantized weights."""

    weight: QuantizedWeight
    rows: range
    columns: range
    read_stored: ReadStored
    device: torch.device

    def read(self) -> QuantizedTensor:
        """Return the part. Only the groups that it uses are in it."""
        used, groups = self._groups().unique(return_inverse=True)
        scales = self._scales()[:, used].contiguous()
        if self.weight.scheme.layout == "fp8":
            return Fp8Weight(
                self._load(self.weight.values, self.rows, self.columns), scales, groups
            )
        zeros = self._zeros()[:, used].contiguous()
        return Int4Weight(self._values(), scales, zeros, groups)

    def _values(self) -> Tensor:
        """Return the values of four bits, uint8 [num_outputs, num_inputs]."""
        info = self.weight.values
        match self.weight.scheme.layout:
            case "awq":
                packed = self._load(info, self.columns, packed_range(self.rows))
                return unpack(packed, self.rows, AWQ_PLACES).T.contiguous()
            case "gptq":
                packed = self._load(info, packed_range(self.columns), self.rows)
                return unpack(packed.T, self.columns)
        return unpack(self._load(info, self.rows, packed_range(self.columns)), self.columns)

    def _scales(self) -> Tensor:
        """Return the scales of all groups, float32 [num_outputs, num_groups]."""
        scheme = self.weight.scheme
        info = self.weight.scales
        if scheme.layout in ("awq", "gptq"):
            return self._load(info, range(info.shape[0]), self.rows).T.float()
        stored = self.read_stored(info, ()).to(self.device).float()
        if scheme.rows == 0:
            return stored.reshape(1, 1).expand(len(self.rows), 1)
        rows = torch.tensor(self.rows, dtype=torch.int64, device=self.device) // scheme.rows
        return stored.reshape(info.shape[0], -1)[rows]

    def _zeros(self) -> Tensor:
        """Return the zero points of all groups, uint8 [num_outputs, num_groups]."""
        scheme = self.weight.scheme
        info = self.weight.zeros
        if info is None:
            shape = (len(self.rows), self.weight.num_groups)
            return torch.full(shape, MIDDLE, dtype=torch.uint8, device=self.device)
        if scheme.layout == "packed":
            packed = self._load(info, packed_range(self.rows), range(info.shape[1])).T
        else:
            packed = self._load(info, range(info.shape[0]), packed_range(self.rows))
        places = AWQ_PLACES if scheme.layout == "awq" else IN_ORDER
        return unpack(packed + scheme.zero_offset, self.rows, places).T

    def _groups(self) -> Tensor:
        """Return the group of each input of the part, int64 [num_inputs]."""
        info = self.weight.groups
        columns = torch.tensor(self.columns, dtype=torch.int64, device=self.device)
        if info is None:
            return columns // (self.weight.scheme.columns or self.weight.shape[1])
        groups = self.read_stored(info, (slice_of(self.columns),)).to(self.device).long()
        if groups.min() < 0 or groups.max() >= self.weight.num_groups:
            raise BadCheckpoint(
                f"{info.file}: the group of an input of {self.weight.name} is not one of its "
                f"{self.weight.num_groups} groups: download the file again"
            )
        return groups

    def _load(self, info: TensorInfo, first: range, second: range) -> Tensor:
        return self.read_stored(info, (slice_of(first), slice_of(second))).to(self.device)


def slice_of(places: range) -> slice:
    return slice(places.start, places.stop)


def packed_range(places: range) -> range:
    """Return the integers that hold the values of some places."""
    return range(places.start // NIBBLES, -(-places.stop // NIBBLES))


def unpack(packed: Tensor, places: range, order: Sequence[int] = IN_ORDER) -> Tensor:
    """Return the values of some places in integers that hold eight each.

    int32 [n, `packed_range(places)`] -> uint8 [n, len(places)]. Value i of an integer is the
    one at bits 4 * order[i].
    """
    octets = packed.flatten().view(torch.uint8)
    values = torch.stack((octets & 15, octets >> 4), -1).view(len(packed), -1, NIBBLES)
    if order != IN_ORDER:
        values = values[..., list(order)]
    start = places.start % NIBBLES
    return values.flatten(1)[:, start : start + len(places)].contiguous()
