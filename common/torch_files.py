"""Reads the table of contents of a torch file (`.bin`, `.pt`) without torch.

`torch.save` writes a zip archive: an entry `data.pkl` that describes the tensors, and an entry for
each storage, which holds elements as they are in memory. Nothing is compressed, so that parts of a
tensor can be read from their place in the file. The file may be made to do harm.
"""

import io
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from common.families.family import BadCheckpoint
from common.model_files import MAX_SHOWN_CHARS, shown
from common.tensor_info import ITEM_BITS, MAX_NAME_CHARS, TensorInfo
from common.torch_pickle import StoredTensor, read_pickle

MAX_READ_BYTES = 16 * 2**20
"""No directory of an archive and no pickle is larger. A file with 50,000 tensors has 8 MB of it."""
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How files begin that torch before 1.6 wrote."""
CONTAINERS = ("state_dict", "module", "model")
"""The keys under which training programs keep the weights; the first one counts."""
WRAPPER = "module."
"""What precedes the names in `module`, because training wrapped the model."""
ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    OSError,
    OverflowError,
    ValueError,
    struct.error,
)
"""What the standard library raises for archives that are damaged."""
ENTRY_HEADER = struct.Struct("<4s2xHH16xHH")
"""The header of an entry: signature, flags, compression, length of the name and of the rest."""
ENTRY_SIGNATURE = b"PK\x03\x04"
ENCRYPTED = 1
IS_UTF8 = 0x800


@dataclass(frozen=True, slots=True)
class Span:
    """Where the bytes of an archive's entry are in the file."""

    start: int
    size: int


class BoundedFile(io.FileIO):
    """A file of which no large part is read at once, whatever lengths it claims for its parts."""

    def read(self, size: int | None = -1, /) -> bytes:
        most = MAX_READ_BYTES + 1
        data = super().read(most if size is None or size < 0 else min(size, most))
        if len(data) > MAX_READ_BYTES:
            raise BadCheckpoint(f"its directory or its pickle has more than {MAX_READ_BYTES} bytes")
        return data


def read_table(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a torch file by their names.

    They are at its top, or in a dictionary there (`CONTAINERS`). What is not a tensor is left out.

    Raises
    ------
    BadCheckpoint
        if it is not such a file, is damaged, or holds more than tensors in dictionaries. Nothing
        that it names has been executed.
    """
    try:
        with BoundedFile(file) as f:
            check_magic(f.read(len(LEGACY_MAGIC)))
            archive = Archive(f)
            found = read_pickle(archive.read("data.pkl"))
            stored = dict(named_tensors(found))
            spans = archive.storages({tensor.storage.key for tensor in stored.values()})
            return {name: place(file, name, t, spans) for name, t in stored.items()}
    except OSError as e:
        raise BadCheckpoint(f"{file} cannot be read: {e.strerror}") from e
    except BadCheckpoint as e:
        raise BadCheckpoint(f"{file} is not a torch file that can be loaded: {e}") from e


def check_magic(magic: bytes) -> None:
    if magic == LEGACY_MAGIC:
        raise BadCheckpoint(
            "it is in the format of torch before 1.6; convert it once where you trust it: "
            "torch.save(torch.load(FILE, weights_only=True), FILE)"
        )


class Archive:
    """A zip archive as torch writes it."""

    def __init__(self, file: BoundedFile) -> None:
        self._file = file
        try:
            directory = zipfile.ZipFile(file)
        except BadCheckpoint:
            raise
        except ZIP_ERRORS as e:
            raise BadCheckpoint("it is not a whole zip archive; download it again") from e
        self._end = directory.start_dir
        """Where the entries end, and the archive's directory begins."""
        self._entries = {entry.filename: entry for entry in directory.infolist()}
        if len(self._entries) != len(directory.infolist()):
            raise BadCheckpoint("two entries of its archive have one name")
        pickles = [name for name in self._entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise BadCheckpoint("its archive does not hold one data.pkl")
        self._root = pickles[0].removesuffix("data.pkl")
        if self._root + "byteorder" in self._entries and self.read("byteorder") != b"little":
            raise BadCheckpoint(
                "it was saved on a big-endian machine; load it with torch there or here, and save "
                "it again on a little-endian machine"
            )

    def read(self, name: str) -> bytes:
        """Return the bytes of an entry."""
        span = self._span(name)
        self._file.seek(span.start)
        return self._file.read(span.size)

    def storages(self, keys: set[str]) -> dict[str, Span]:
        """Return where the storages of a pickle are. No two of them overlap."""
        spans = {key: self._span(f"data/{key}") for key in keys}
        ordered = sorted(spans.values(), key=lambda span: span.start)
        for first, second in pairwise(ordered):
            if first.start + first.size > second.start:
                raise BadCheckpoint("entries of its archive overlap")
        return spans

    def _span(self, name: str) -> Span:
        """Return where an entry's bytes are. Raises BadCheckpoint if it does not say so itself."""
        entry = self._entries.get(self._root + name)
        if entry is None:
            raise BadCheckpoint(f"{shown(name)} is missing in its archive")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise BadCheckpoint("its archive is compressed; save it again with torch.save")
        if not 0 <= entry.header_offset <= self._end:
            raise BadCheckpoint(f"the entry {shown(name)} of its archive is not what it claims")
        self._file.seek(entry.header_offset)
        header = self._file.read(ENTRY_HEADER.size)
        if len(header) < ENTRY_HEADER.size:
            raise BadCheckpoint("it is cut off; download it again")
        signature, flags, compression, name_size, rest_size = ENTRY_HEADER.unpack(header)
        if (
            signature != ENTRY_SIGNATURE
            or flags & ENCRYPTED
            or compression != zipfile.ZIP_STORED
            or self._file.read(name_size) != raw_name(entry)
        ):
            raise BadCheckpoint(f"the entry {shown(name)} of its archive is not what it claims")
        start = entry.header_offset + ENTRY_HEADER.size + name_size + rest_size
        if start + entry.file_size > self._end:
            raise BadCheckpoint("it is cut off; download it again")
        return Span(start, entry.file_size)


def raw_name(entry: zipfile.ZipInfo) -> bytes:
    return entry.orig_filename.encode("utf-8" if entry.flag_bits & IS_UTF8 else "cp437")


def named_tensors(found: Any) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors of a pickle by their names.

    Raises
    ------
    BadCheckpoint
        if it does not hold a dictionary, or a name is too long or occurs twice.
    """
    if not isinstance(found, dict):
        raise BadCheckpoint("it does not hold a dictionary of tensors")
    container = next((key for key in CONTAINERS if isinstance(found.get(key), dict)), None)
    names = set()
    for key, value in (found[container] if container else found).items():
        if not isinstance(value, StoredTensor) or not isinstance(key, str):
            continue
        name = key.removeprefix(WRAPPER) if container == "module" else key
        if len(name) > MAX_NAME_CHARS or name in names:
            raise BadCheckpoint(f"the name {shown(name)} is too long, or occurs twice")
        names.add(name)
        yield name, value


def place(file: Path, name: str, tensor: StoredTensor, spans: dict[str, Span]) -> TensorInfo:
    """Return where a tensor is in the file.

    Raises
    ------
    BadCheckpoint
        if it does not lie in its storage, or its elements are not in row order.
    """
    storage = tensor.storage
    span = spans[storage.key]
    item_bytes = ITEM_BITS[storage.dtype] // 8
    num_items = prod(tensor.shape)
    shown_name = name[:MAX_SHOWN_CHARS]
    if storage.num_items * item_bytes != span.size:
        raise BadCheckpoint(f"the storage of {shown_name} has {span.size} bytes: it is damaged")
    if tensor.offset + num_items > storage.num_items:
        raise BadCheckpoint(f"{shown_name} does not lie in its storage")
    if not is_contiguous(tensor):
        raise BadCheckpoint(
            f"the elements of {shown_name} are not in row order; save it again after "
            "tensor.contiguous()"
        )
    start = span.start + tensor.offset * item_bytes
    return TensorInfo(file, storage.dtype, tensor.shape, num_items * item_bytes, start)


def is_contiguous(tensor: StoredTensor) -> bool:
    """Whether the elements follow each other in row order. Dimensions of one do not matter."""
    expected = 1
    for length, stride in reversed(list(zip(tensor.shape, tensor.strides, strict=True))):
        if length != 1 and stride != expected:
            return 0 in tensor.shape
        expected *= length
    return True
