"""`twinlens convert` renames the tensors of a model, and changes nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.checkpoint import open_checkpoint
from common.weight_files import find_weight_files
from services.cli import make_parser, run
from tests.golden import GoldenCase

PUBLISHED = GoldenCase("a_image", "wemm").checkpoint
RENAMED = GoldenCase("a_image_renamed", "wemm").checkpoint


def convert(model: Path, out: Path) -> int:
    return run(make_parser().parse_args(["convert", "wemm", f"--model={model}", f"--out={out}"]))


def tensors_of(model: Path) -> dict[str, bytes]:
    found = {}
    for file in find_weight_files(model):
        tensors = load_file(file).items()
        found |= {name: bytes(tensor.view(torch.uint8).numpy()) for name, tensor in tensors}
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint that may be changed."""
    return Path(shutil.copytree(PUBLISHED, tmp_path / "model"))


def test_tensors_get_their_short_names_and_keep_their_values(tmp_path: Path) -> None:
    assert convert(PUBLISHED, tmp_path / "out") == 0
    found = tensors_of(tmp_path / "out")
    assert found == tensors_of(RENAMED)
    assert found.keys() != tensors_of(PUBLISHED).keys()
    assert open_checkpoint(tmp_path / "out").tensors.keys() == found.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_files_are_copied(tmp_path: Path) -> None:
    convert(PUBLISHED, tmp_path / "out")
    index = "model.safetensors.index.json"
    for file in PUBLISHED.iterdir():
        copy = tmp_path / "out" / file.name
        if file.suffix != ".safetensors" and file.name != index:
            assert copy.read_bytes() == file.read_bytes()
    old, new = (json.loads((path / index).read_text()) for path in (PUBLISHED, tmp_path / "out"))
    assert new["metadata"] == old["metadata"]
    assert list(new["weight_map"].values()) == list(old["weight_map"].values())


def test_the_metadata_of_a_file_stays(tmp_path: Path, model: Path) -> None:
    file = model / "model-00001-of-00002.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    assert convert(model, tmp_path / "out") == 0
    data = (tmp_path / "out" / file.name).read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert json.loads(data[8 : 8 + length])["__metadata__"] == {"format": "pt"}
    assert length % 8 == 0


def test_a_folder_that_exists_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(PUBLISHED, tmp_path) == 2
    assert "exists and is not overwritten: give --out a new folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def remove_shard(model: Path) -> None:
    (model / "model-00002-of-00002.safetensors").unlink()


def cut_shard(model: Path) -> None:
    file = model / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def remove_config(model: Path) -> None:
    (model / "config.json").unlink()


def repeat_names(model: Path) -> None:
    file = model / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    name = "language_model.model.layers.0.attention.wo.original_linear.weight"
    save_file(tensors | {name.replace("original_linear.", ""): tensors[name].clone()}, file)


def link_out(model: Path) -> None:
    (model / "README.md").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_shard, "is incomplete: model-00002-of-00002.safetensors missing"),
        (cut_shard, "is cut off"),
        (remove_config, "has no config.json"),
        (repeat_names, "would have the same name"),
        (link_out, "is a link to a file outside"),
    ],
)
def test_a_model_that_is_not_whole_is_refused(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    message: str,
) -> None:
    change(model)
    assert convert(model, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_families_have_nothing_to_convert(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["convert", "qwen2_5_vl", "--model=a", "--out=b"])
    assert "choose from" in capsys.readouterr().err
