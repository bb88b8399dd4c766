"""A torch file that was made to do harm is refused. Nothing that it names runs, or is imported."""

import random
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common import torch_files, torch_pickle
from common.checkpoint import BadCheckpoint
from common.torch_files import read_table

STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
"""The storage `data/0` of four numbers."""
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(%bK\0K\x04\x85K\x01\x85\x89)tR" % STORAGE


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def entry(name: str, value: bytes = TENSOR) -> bytes:
    return text(name) + value + b"s"


def pickle(*entries: bytes) -> bytes:
    return b"\x80\x02}" + b"".join(entries) + b"."


GOOD = pickle(entry("w"))


@pytest.fixture
def archive(tmp_path: Path) -> Callable[..., Path]:
    """Write a torch file with this pickle, and these further entries."""

    def write(data: bytes = GOOD, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
        file = tmp_path / "a.pt"
        with zipfile.ZipFile(file, "w", compression) as made:
            made.writestr("a/data.pkl", data)
            for name, content in ({"data/0": bytes(16)} | entries).items():
                made.writestr(f"a/{name}", content)
        return file

    return write


def refusal(file: Path) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        read_table(file)
    assert str(file) in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)


def test_the_archive_of_these_tests_is_read(archive: Callable[..., Path]) -> None:
    assert read_table(archive())["w"].shape == (4,)


@pytest.mark.parametrize(
    "call",
    [
        b"cos\nsystem\n" + text("touch harm") + b"\x85R",
        b"cposix\nsystem\n" + text("touch harm") + b"\x85R",
        b"cbuiltins\neval\n" + text("1") + b"\x85R",
        b"ctwinlens_harm\nrun\n)R",
        text("os") + text("system") + b"\x93" + text("touch harm") + b"\x85R",
        b"ctorch.storage\n_load_from_bytes\n" + text("x") + b"\x85R",
        b"ctorch.serialization\nload\n" + text("x") + b"\x85R",
        b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n)R",
        b"ctorch._utils\n_rebuild_parameter_with_state\n)R",
        b"cnumpy.core.multiarray\nscalar\n)R",
        b"ctorch\nQInt8Storage\n)R",
        b"ctorch\nComplexFloatStorage\n)R",
        b"c__main__\nNamespace\n)\x81",
    ],
)
def test_what_a_file_names_is_refused_by_name_and_does_not_run(
    archive: Callable[..., Path], call: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "twinlens_harm.py").write_text("open('harm', 'w')\ndef run(): ...")
    said = refusal(archive(pickle(entry("w"), entry("x", call))))
    assert "which may not be loaded; nothing was executed" in said
    assert not (tmp_path / "harm").exists() and "twinlens_harm" not in sys.modules


@pytest.mark.parametrize(
    "code",
    [
        b"(i__main__\nNamespace\n",
        b"(cos\nsystem\no",
        b"\x82\x01",
        b"\x83\x01\0",
        b"\x84\x01\0\0\0",
        b"\x92",
        b"Pname\n",
        b"2",
        b"0",
        b"\x8b\xff\xff\xff\x7f",
        b"\x8d" + b"\xff" * 8,
        b"\x96" + b"\xff" * 8,
        b"\x97",
    ],
)
def test_operations_that_no_tensor_needs_are_refused(
    archive: Callable[..., Path], code: bytes
) -> None:
    said = refusal(archive(pickle(text("x") + code)))
    assert "which no tensor needs" in said or "may not be loaded" in said


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pickle(entry("w", TENSOR.replace(b"K\0K\x04\x85", b"K\x01K\x04\x85"))), "in its storage"),
        (pickle(entry("w", TENSOR.replace(b"K\0K\x04\x85", b"K\0K\x05\x85"))), "in its storage"),
        (pickle(entry("w", TENSOR.replace(b"K\0K\x04", b"J\xff\xff\xff\xffK\x04"))), "malformed"),
        (pickle(entry("w", TENSOR.replace(b"K\x01\x85", b"K\x02\x85"))), "row order"),
        (pickle(entry("w", TENSOR.replace(b"K\x01\x85", b"K\0\x85"))), "row order"),
        (pickle(entry("w", TENSOR.replace(b"K\x01\x85", b")"))), "malformed"),
        (pickle(entry("w", TENSOR.replace(b"cpuK\x04", b"cpuK\x05"))), "16 bytes: it is damaged"),
        (pickle(entry("w", TENSOR.replace(b"cpuK\x04", b"cpuK\x03"))), "16 bytes: it is damaged"),
        (pickle(entry("w", TENSOR.replace(b"\0\0\x000X", b"\0\0\x001X"))), "data/1' is missing"),
        (pickle(entry("w", TENSOR.replace(b"ctorch\nFloatStorage\n", b"N"))), "malformed"),
        (pickle(entry("w" * 2000)), "too long"),
        (pickle(entry("module", b"}" + entry("module.w") + entry("w"))), "occurs twice"),
        (pickle(b"K\x01\x85", TENSOR, b"s"), "keys that are neither"),
        (pickle(entry("w") + b"u"), "damaged"),
        (pickle(entry("w") + b"e"), "damaged"),
        (pickle(entry("w") + b"h\x09"), "damaged"),
        (pickle(entry("w") + b"X\xff\xff\xff\xff"), "damaged"),
        (pickle(b"X\x01\0\0\0\xffNs"), "damaged"),
        (b"\x80\x06}.", "protocol 6"),
        (b"\x80\x02}", "damaged"),
        (b"", "damaged"),
        (b".", "damaged"),
        (b"].", "not hold a dictionary"),
        (pickle(entry("w", TENSOR + b"}b")), "sets attributes"),
        (pickle(entry("w", b"ctorch\nFloatStorage\n)R")), "calls what is not a function"),
        (pickle(entry("w", b"}" + b")R")), "calls what is not a function"),
        (pickle(entry("w", b"ccollections\nOrderedDict\n" + TENSOR + b"\x85R")), "malformed"),
        (pickle(entry("w", b"ctorch._utils\n_rebuild_parameter\nN\x85R")), "malformed"),
    ],
)
def test_a_malformed_pickle_is_refused(
    archive: Callable[..., Path], data: bytes, said: str
) -> None:
    assert said in refusal(archive(data))


def test_a_tuple_that_is_endless_to_hash_is_not_hashed(archive: Callable[..., Path]) -> None:
    """Each doubling costs three bytes, and once doubled the time to compare or hash the whole."""
    doubled = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(200))
    assert "neither text nor numbers" in refusal(archive(pickle(doubled + b"Ns")))


def test_deep_nesting_and_a_dictionary_in_itself_end(archive: Callable[..., Path]) -> None:
    nested = b"]" * 200_000 + b"a" * 199_999
    assert read_table(archive(pickle(entry("x", nested), entry("w")))).keys() == {"w"}
    itself = b"\x80\x02}q\0" + text("model") + b"h\0s" + entry("w") + b"."
    assert read_table(archive(itself)).keys() == {"w"}


def test_a_pickle_with_too_many_operations_is_refused_in_time(
    archive: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_pickle, "MAX_OPERATIONS", 1000)
    assert "more than 1000 operations" in refusal(archive(pickle(b"}" * 2000)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compression": zipfile.ZIP_DEFLATED}, "compressed"),
        ({"data/0": bytes(15)}, "15 bytes: it is damaged"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"extra/data.pkl": GOOD}, "one data.pkl"),
    ],
    ids=["compressed", "storage", "big-endian", "two pickles"],
)
def test_a_wrong_archive_is_refused(
    archive: Callable[..., Path], change: dict[str, object], said: str
) -> None:
    assert said in refusal(archive(**change))


def test_a_large_part_is_not_read(
    archive: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_files, "MAX_READ_BYTES", 1000)
    assert read_table(archive())
    assert "more than 1000 bytes" in refusal(archive(pickle(entry("w"), entry("x" * 2000, b"N"))))
    many = {f"data/{i}": b"" for i in range(1, 100)}
    assert "more than 1000 bytes" in refusal(archive(**many))


def central(name: bytes, field: int, form: str, value: int) -> Callable[[bytes], bytes]:
    """Change a field of an entry of the archive's directory."""

    def change(data: bytes) -> bytes:
        start = data.rindex(name) - 46 + field
        size = struct.calcsize(form)
        return data[:start] + struct.pack(form, value) + data[start + size :]

    return change


@pytest.mark.parametrize(
    "change",
    [
        central(b"a/data/0", 42, "<I", 0),
        central(b"a/data/0", 42, "<I", 5),
        central(b"a/data/0", 42, "<I", 2**32 - 2),
        central(b"a/data/0", 20, "<Q", 2**31 << 32 | 2**31),
        central(b"a/data/0", 20, "<I", 2**31),
        central(b"a/data/0", 24, "<I", 2**31),
        lambda data: data.replace(b"a/data/0", b"a/data/1", 1),
        lambda data: data.replace(b"a/data/0", b"a/data.pkl"[:8]),
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b"PK\x05\x06", b"PK\x05\x07"),
        lambda data: b"",
        lambda data: b"PK",
        lambda data: b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_an_archive_that_lies_is_refused(
    archive: Callable[..., Path], change: Callable[..., bytes]
) -> None:
    file = archive()
    file.write_bytes(change(file.read_bytes()))
    refusal(file)


def local(name: bytes, field: int, value: int) -> Callable[[bytes], bytes]:
    """Change a field of an entry's own header."""

    def change(data: bytes) -> bytes:
        start = data.index(name) - 30 + field
        return data[:start] + struct.pack("<H", value) + data[start + 2 :]

    return change


@pytest.mark.parametrize(
    "change", [local(b"a/data/0", 6, 1), local(b"a/data/0", 8, zipfile.ZIP_DEFLATED)]
)
def test_an_entry_whose_own_header_says_otherwise_is_refused(
    archive: Callable[..., Path], change: Callable[[bytes], bytes]
) -> None:
    file = archive()
    file.write_bytes(change(file.read_bytes()))
    assert "not what it claims" in refusal(file)


def test_an_entry_that_reaches_into_the_directory_is_refused(
    archive: Callable[..., Path],
) -> None:
    """Its size is right for its tensor, but the archive's directory begins before its end."""
    file = archive(pickle(entry("w", TENSOR.replace(b"cpuK\x04", b"cpuK\x08"))))
    file.write_bytes(central(b"a/data/0", 20, "<Q", 32 << 32 | 32)(file.read_bytes()))
    assert "cut off" in refusal(file)


def test_an_entry_beyond_all_files_is_refused(archive: Callable[..., Path]) -> None:
    """Its place takes 64 bits, which no file position does."""
    file = archive()
    data = central(b"a/data/0", 42, "<I", 2**32 - 1)(file.read_bytes())
    data = central(b"a/data/0", 30, "<H", 12)(data)
    end = data.rindex(b"a/data/0") + 8
    data = data[:end] + struct.pack("<HHQ", 1, 8, 2**64 - 1) + data[end:]
    size = data.rindex(b"PK\x05\x06") + 12
    (directory_bytes,) = struct.unpack_from("<I", data, size)
    file.write_bytes(data[:size] + struct.pack("<I", directory_bytes + 12) + data[size + 4 :])
    assert "not what it claims" in refusal(file)


def test_two_entries_of_one_name_are_refused(archive: Callable[..., Path]) -> None:
    file = archive()
    with pytest.warns(UserWarning), zipfile.ZipFile(file, "a") as made:
        made.writestr("a/data/0", bytes(16))
    assert "have one name" in refusal(file)


def test_storages_that_overlap_are_refused(archive: Callable[..., Path]) -> None:
    """One storage is inside another, where it has a header of its own. Many of them, each inside
    the one before, would make a small file large."""
    inner = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 16, 16, 8, 0) + b"a/data/1"
    outer = TENSOR.replace(b"cpuK\x04", b"cpuK\x0e")
    second = TENSOR.replace(b"\0\0\x000X", b"\0\0\x001X")
    contents = {"data/0": inner + bytes(18), "data/1": bytes(16)}
    file = archive(pickle(entry("w", outer), entry("x", second)), **contents)
    assert read_table(file).keys() == {"w", "x"}
    data = file.read_bytes()
    file.write_bytes(central(b"a/data/1", 42, "<I", data.index(inner))(data))
    assert "overlap" in refusal(file)


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, seed: int) -> None:
    """Whatever byte changes, no other error comes out, and no tensor lies outside of the file."""
    file = tmp_path / "a.pt"
    torch.save({"a": torch.ones(3, 2), "b": {"c": torch.ones(1)}, "d": torch.ones(2)}, file)
    good = file.read_bytes()
    chance = random.Random(seed)
    for _ in range(150):
        data = bytearray(good)
        for _ in range(chance.choice((1, 1, 2, 8))):
            data[chance.randrange(len(data))] = chance.choice((0, 1, 255, chance.randrange(256)))
        file.write_bytes(data[: chance.choice((len(data), chance.randrange(len(data))))])
        try:
            table = read_table(file)
        except BadCheckpoint:
            continue
        size = file.stat().st_size
        assert all(0 <= t.offset <= t.offset + t.num_bytes <= size for t in table.values())
