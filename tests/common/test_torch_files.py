"""A torch file is read as torch reads it, from its place in the file, and without torch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.torch_files import BadCheckpoint, read_table
from tests.golden import GoldenCase

DTYPES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
QWEN = GoldenCase("c_box_two_images", "qwen_vl").checkpoint
QWEN_SHARDS = GoldenCase("a_chat_image", "qwen_vl").checkpoint
VLMO = [
    GoldenCase(case, "vlmo").checkpoint for case in ("vqa_base", "vqa_base_plus", "retrieval_base")
]
FILES = [
    *QWEN.glob("*.bin"),
    *QWEN_SHARDS.glob("*.bin"),
    *(file for folder in VLMO for file in folder.glob("*.pt")),
]


def read(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, read from their places."""
    data = file.read_bytes()
    tensors = {}
    for name, info in read_table(file).items():
        assert info.file == file
        part = bytearray(data[info.offset : info.offset + info.num_bytes])
        dtype = DTYPES[info.dtype]
        flat = torch.frombuffer(part, dtype=dtype) if part else torch.empty(0, dtype=dtype)
        tensors[name] = flat.view(info.shape)
    return tensors


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].equal(tensor), name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_golden_files_are_read_as_torch_reads_them(file: Path) -> None:
    loaded = torch.load(file, weights_only=True)
    weights = loaded.get("state_dict") or loaded.get("model") or loaded
    found = read(file)
    assert len(found) > 10
    assert_equal(found, weights)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_each_type_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.arange(6).view(2, 3).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
    }
    torch.save(tensors, tmp_path / "a.bin")
    assert_equal(read(tmp_path / "a.bin"), tensors)


def test_tensors_may_share_a_storage(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    tensors = {"whole": whole, "again": whole, "rows": whole[1:3], "one": whole[2, 3]}
    torch.save(tensors, tmp_path / "a.bin")
    found = read_table(tmp_path / "a.bin")
    assert_equal(read(tmp_path / "a.bin"), tensors)
    assert found["whole"] == found["again"]
    assert found["rows"].offset == found["whole"].offset + 6 * 4


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_module_is_read_in_each_protocol(tmp_path: Path, protocol: int) -> None:
    """The state of a module has attributes, and its parameters are wrapped."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    file = tmp_path / "a.pt"
    torch.save(dict(module.named_parameters()), file, pickle_protocol=protocol)
    assert_equal(read(file), {name: p.data for name, p in module.named_parameters()})
    torch.save(module.state_dict(), file, pickle_protocol=protocol)
    assert_equal(read(file), module.state_dict())


@pytest.mark.parametrize("wrap", ["", "state_dict", "model", "module"])
def test_what_surrounds_the_tensors_is_left_out(tmp_path: Path, wrap: str) -> None:
    tensors = {"module.a": torch.ones(2), "b": torch.zeros(3)}
    whole: dict[Any, Any] = {"epoch": 3, "rate": 0.5, "done": True, "none": None, 7: ["x", (1, 2)]}
    torch.save(whole | ({wrap: tensors} if wrap else tensors), tmp_path / "a.pt")
    names = {"a", "b"} if wrap == "module" else {"module.a", "b"}
    assert read_table(tmp_path / "a.pt").keys() == names


def test_what_is_named_as_a_container_may_be_a_tensor(tmp_path: Path) -> None:
    torch.save({"model": torch.ones(2)}, tmp_path / "a.pt")
    assert read_table(tmp_path / "a.pt").keys() == {"model"}


def test_a_tensor_whose_elements_are_not_in_row_order_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, 3).T}, tmp_path / "a.pt")
    with pytest.raises(BadCheckpoint, match=r"the elements of w are not in row order"):
        read_table(tmp_path / "a.pt")


def test_dimensions_of_one_are_in_any_order(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(5).view(5, 1).T, "x": torch.arange(3).expand(1, 3)}
    torch.save(tensors, tmp_path / "a.pt")
    assert_equal(read(tmp_path / "a.pt"), tensors)


def test_a_file_of_old_torch_says_how_to_convert_it(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(BadCheckpoint, match=r"before 1\.6; convert it .* weights_only=True"):
        read_table(tmp_path / "a.pt")
