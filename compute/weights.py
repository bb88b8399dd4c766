"""Reads the tensors of a checkpoint, whole or as slices, by their canonical names.

The tensors of a checkpoint that has no weights are on the device `meta`: they have no values.
"""

import mmap
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import BadCheckpoint, Checkpoint, TensorInfo
from compute.quantized_reading import read_part
from compute.quantized_weights import QuantizedTensor

Index = tuple[slice, ...]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types of tensors that are read as they are."""
STORED = DTYPES | {"F8_E4M3": torch.float8_e4m3fn, "I32": torch.int32, "I64": torch.int64}
"""Those and the types of the parts of quantized weights."""


class Weights:
    """Reads a checkpoint's tensors by their canonical names. It reads only what is asked for."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        counts: Callable[[str], bool] = lambda name: True,
        report_loading: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        """After each read, `report_loading` gets the fraction of the bytes that were asked for.

        The whole is the bytes of the tensors whose canonical names `counts` accepts.
        """
        self._checkpoint = checkpoint
        canonical_name = checkpoint.family.canonical_name
        self._tensors = {
            canonical_name(name): (name, info) for name, info in checkpoint.tensors.items()
        }
        self._files: dict[Path, mmap.mmap] = {}
        self._report_loading = report_loading
        uses = checkpoint.family.uses
        self._unread = {
            name: info.num_bytes
            for name, (_, info) in self._tensors.items()
            if counts(name) and uses(checkpoint, name) and not checkpoint.is_quantized(name)
        }
        self._unread |= {
            name: weight.num_bytes for name, weight in checkpoint.quantized.items() if counts(name)
        }
        self._total = max(sum(self._unread.values()), 1)
        self.num_bytes_read = 0
        """The bytes read so far, as stored. A rank reads only its slices."""

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Return a whole tensor, which is dequantized if need be.

        Raises BadCheckpoint if its shape in the file is not `shape`.
        """
        return self._read(name, shape, (), dtype, device)

    def slice(
        self,
        name: str,
        shape: tuple[int, ...],
        dim: int,
        start: int,
        stop: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Return entries `start` to `stop` along `dim`, dequantized if need be.

        Raises BadCheckpoint if the shape of the whole tensor in the file is not `shape`.
        """
        assert 0 <= start <= stop <= shape[dim], f"{name}: {start}:{stop} of {shape}"
        return self._read(name, shape, (slice(None),) * dim + (slice(start, stop),), dtype, device)

    def quantized(
        self, name: str, shape: tuple[int, ...], index: Index, device: torch.device
    ) -> QuantizedTensor | None:
        """Return a part of quantized weights; None if they are not quantized.

        Raises BadCheckpoint if the shape of all of them in the file is not `shape`, or a value has
        no meaning.
        """
        weight = self._checkpoint.quantized.get(name)
        if weight is None:
            return None
        if not weight.may_have_shape(shape):
            raise BadCheckpoint(
                f"{weight.values.file}: {weight.name} holds weights of shape {weight.shape}, "
                f"config.json makes it {shape}"
            )
        part = read_part(weight, (shape[0], shape[1]), index, self._stored, device)
        self._report(name)
        return part

    def _read(
        self,
        name: str,
        shape: tuple[int, ...],
        index: Index,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        if not self._checkpoint.has_weights:
            if name not in self._checkpoint.quantized:
                self._find(name, shape)
            return torch.empty(shape, dtype=dtype, device="meta")[index or ...]
        if (part := self.quantized(name, shape, index, device)) is not None:
            return part.dequantized().to(dtype)
        loaded = self._stored(self._find(name, shape), index).to(device=device, dtype=dtype)
        self._report(name)
        return loaded

    def _stored(self, info: TensorInfo, index: Index) -> torch.Tensor:
        """Return a part of a tensor in the type that it has in its file.

        It is always a copy: the file may be replaced while it is served.
        """
        part = self._mapped(info)[index or ...]
        stored = torch.from_numpy(part.copy()).view(STORED[info.dtype])
        self.num_bytes_read += stored.nbytes
        return stored

    def _report(self, name: str) -> None:
        self._unread.pop(name, None)
        self._report_loading(1 - sum(self._unread.values()) / self._total)

    def _find(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        if name not in self._tensors:
            raise BadCheckpoint(
                f"{self._checkpoint.path} has no tensor {name}: the weights do not belong to its "
                "config.json"
            )
        stored_name, info = self._tensors[name]
        if info.shape != shape:
            raise BadCheckpoint(
                f"{info.file}: {stored_name} has shape {info.shape}, config.json makes it {shape}"
            )
        if info.dtype not in DTYPES:
            raise BadCheckpoint(
                f"{info.file}: {stored_name} is {info.dtype}, supported are {', '.join(DTYPES)}, "
                "and quantized weights that config.json describes (docs/quantization.md)"
            )
        return info

    def _mapped(self, info: TensorInfo) -> np.ndarray:
        """Return a view of a tensor in its file, as integers of the elements' size."""
        try:
            if info.file not in self._files:
                with info.file.open("rb") as f:
                    self._files[info.file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as e:
            raise BadCheckpoint(f"{info.file} cannot be read: {e}") from e
        file = self._files[info.file]
        if info.offset + info.num_bytes > len(file):
            raise BadCheckpoint(f"{info.file} cannot be read: the file was cut off")
        item = np.dtype(f"i{STORED[info.dtype].itemsize}")
        return np.frombuffer(file, item, prod(info.shape), info.offset).reshape(info.shape)
