"""A model directory is opened where it is whole, and refused by name of what is wrong with it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from common.checkpoint import BadCheckpoint, Checkpoint, open_checkpoint
from common.families import FAMILIES
from common.families.qwen2_5_vl import Qwen25VL
from common.model_files import MAX_JSON_BYTES
from tests.golden import CASES, GoldenCase

TEXT = {"hidden_size": 8, "max_position_embeddings": 64, "eos_token_id": 3}
VISION = {"depth": 2}
PUBLISHED = {"model_type": "qwen2_5_vl", "torch_dtype": "bfloat16", "vision_config": VISION, **TEXT}
NESTED = {
    "model_type": "qwen2_5_vl",
    "dtype": "float32",
    "vision_config": VISION,
    "text_config": TEXT,
}
BIN = "pytorch_model.bin"
TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.float16)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole model directory."""
    folder = tmp_path / "model"
    folder.mkdir()
    write(
        folder,
        config=NESTED,
        tokenizer={},
        preprocessor_config={},
        generation_config={"eos_token_id": [3, 5]},
    )
    save_file(TENSORS, folder / "model.safetensors")
    return folder


def write(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name, array in TENSORS.items():
        save_file({name: array}, folder / f"model-{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {name: f"model-{name}.safetensors" for name in TENSORS}})
    )


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# What is whole


@pytest.mark.parametrize(
    ("config", "dtype"), [(PUBLISHED, "bfloat16"), (NESTED, "float32")], ids=["published", "nested"]
)
def test_both_layouts_of_the_configuration_say_the_same(
    model: Path, config: dict[str, Any], dtype: str
) -> None:
    write(model, config=config)
    checkpoint = open_checkpoint(model)
    assert {name: checkpoint.text_config[name] for name in TEXT} == TEXT
    assert (checkpoint.vision_config, checkpoint.max_model_len, checkpoint.dtype) == (
        VISION,
        64,
        dtype,
    )
    assert (checkpoint.name, checkpoint.family.model_type) == ("model", "qwen2_5_vl")


def as_torch_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(a) for name, a in TENSORS.items()}, folder / BIN)


def as_torch_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name, array in TENSORS.items():
        torch.save({name: torch.from_numpy(array)}, folder / f"pytorch_model-{name}.bin")
    (folder / f"{BIN}.index.json").write_text(
        json.dumps({"weight_map": {name: f"pytorch_model-{name}.bin" for name in TENSORS}})
    )


@pytest.mark.parametrize("cut", [lambda folder: None, shard, as_torch_file, as_torch_shards])
def test_every_tensor_is_listed_with_its_place(model: Path, cut: Callable[[Path], None]) -> None:
    cut(model)
    found = open_checkpoint(model).tensors
    assert {name: (info.dtype, info.shape, info.num_bytes) for name, info in found.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("F16", (4,), 8),
    }
    for name, info in found.items():
        assert (
            info.file.read_bytes()[info.offset : info.offset + info.num_bytes]
            == TENSORS[name].tobytes()
        )


def test_safetensors_are_preferred_to_torch_files(model: Path) -> None:
    (model / BIN).write_bytes(b"not read")
    assert [file.suffix for file in open_checkpoint(model).weight_files] == [".safetensors"]


class Unusual(Qwen25VL):
    """A family whose directories have no config.json, and weights of any name."""

    model_type = "unusual"
    vocabulary_file = "words.txt"
    required_files = ()
    optional_files = ("sizes.json",)

    def recognises(self, path: Path, config: dict[str, Any]) -> bool:
        return not config and (path / "words.txt").exists()

    def weight_files(self, path: Path, rank: int = 0) -> list[Path]:
        return list(path.glob("*.pt"))


@pytest.fixture
def unusual(model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(FAMILIES, "unusual", Unusual())
    as_torch_file(model)
    (model / BIN).rename(model / "finetuned.pt")
    (model / "config.json").unlink()
    (model / "words.txt").write_text("a")
    return model


def test_a_family_is_recognised_by_what_it_looks_for(unusual: Path) -> None:
    checkpoint = open_checkpoint(unusual)
    assert checkpoint.family.model_type == "unusual" and checkpoint.tensors.keys() == {"a", "b"}
    assert checkpoint.dtype == "float32"


def test_the_optional_files_of_a_family_are_part_of_the_model(
    unusual: Path, tmp_path: Path
) -> None:
    before = open_checkpoint(unusual).fingerprint
    (unusual / "sizes.json").write_text("{}")
    assert open_checkpoint(unusual).fingerprint != before
    (unusual / "sizes.json").rename(tmp_path / "elsewhere")
    (unusual / "sizes.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadCheckpoint, match=r"sizes.json is a link to a file outside"):
        open_checkpoint(unusual)


@pytest.mark.parametrize(
    ("generation", "ids"),
    [({"eos_token_id": [3, 5]}, (3, 5)), ({"eos_token_id": 7}, (7,)), ({}, (3,)), (None, (3,))],
    ids=str,
)
def test_end_tokens_come_from_the_generation_config_then_from_the_model(
    model: Path, generation: Any, ids: tuple[int, ...]
) -> None:
    (model / "generation_config.json").unlink()
    if generation is not None:
        write(model, generation_config=generation)
    assert open_checkpoint(model).eos_token_ids == ids


@pytest.mark.parametrize("name", CASES)
def test_real_checkpoints_open(name: str) -> None:
    checkpoint = open_checkpoint(GoldenCase(name).checkpoint)
    assert (
        checkpoint.max_model_len > 0 and checkpoint.eos_token_ids and len(checkpoint.tensors) > 20
    )


# What is wrong


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def put(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def lose_a_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-b.safetensors").unlink()


def index(content: bytes) -> Callable[[Path], None]:
    return put("model.safetensors.index.json", content)


def weights(header: Any, data: bytes = b"") -> Callable[[Path], None]:
    return put("model.safetensors", safetensors(header, data))


def config(**changed: Any) -> Callable[[Path], None]:
    return lambda folder: write(folder, config=NESTED | changed)


ENTRY = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "no model directory"),
        (remove("config.json"), "config.json"),
        (remove("tokenizer.json"), "tokenizer.json is missing"),
        (remove("preprocessor_config.json"), "preprocessor_config.json is missing"),
        (remove("model.safetensors"), "model.safetensors missing"),
        (lose_a_shard, "model-b.safetensors missing"),
        (put("config.json", b"{"), "not valid JSON"),
        (put("config.json", b"\xff\xfe"), "not valid JSON"),
        (put("config.json", b"[]"), "does not hold a JSON object"),
        (put("config.json", b"{}"), "not supported; supported: qwen2_5_vl"),
        (put("config.json", b'{"model_type": "llama"}'), "family 'llama', which is not supported"),
        (put("config.json", b'{"model_type": ["llama"]}'), "not supported"),
        (index(b"{}"), "no weight_map"),
        (index(b'{"weight_map": ["a"]}'), "no weight_map"),
        (index(b'{"weight_map": {"a": 1}}'), "no weight_map"),
        (index(b'{"weight_map": {}}'), "no tensors"),
        (cut_off, "cut off"),
        (put("model.safetensors", b""), "cut off"),
        (put("model.safetensors", b"\x08\0\0\0\0\0\0\0{}"), "cut off"),
        (put("model.safetensors", b"\xff" * 100), "not a safetensors file"),
        (
            put("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "not a safetensors file",
        ),
        (weights(b"nonsense"), "not a safetensors file"),
        (weights(b"\xff\xff"), "not a safetensors file"),
        (weights([]), "not a safetensors file"),
        (weights({}), "no tensors"),
        (weights({"__metadata__": {"format": "pt"}}), "no tensors"),
        (weights({"a": 1}), "entry of a is malformed"),
        (weights({"a": {}}), "entry of a is malformed"),
        (weights({"a": ENTRY | {"data_offsets": [0]}}, b"ab"), "entry of a is malformed"),
        (weights({"a": ENTRY | {"data_offsets": [2, 0]}}, b"ab"), "entry of a is malformed"),
        (weights({"a": ENTRY | {"data_offsets": [-1, 2]}}, b"ab"), "entry of a is malformed"),
        (weights({"a": ENTRY | {"data_offsets": ["0", "2"]}}, b"ab"), "entry of a is malformed"),
        (weights({"a": ENTRY | {"shape": 2}}, b"ab"), "entry of a is malformed"),
        (weights({"a": ENTRY | {"shape": [-1, -2]}}, b"ab"), "entry of a is malformed"),
        (weights(b"[" * 100_000), "nested too deeply"),
        (weights({"a": ENTRY}, b"a"), "cut off"),
        # What is meant to do harm
        (put("config.json", b'{"a":' * 100_000), "nested too deeply"),
        (put("config.json", b'{"a": NaN}'), "NaN is not a number"),
        (put("config.json", b" " * (MAX_JSON_BYTES + 1)), "larger than 64 MiB"),
        (config(text_config=[]), "text_config in config.json is not an object"),
        (config(vision_config="x" * 9999), "vision_config in config.json is not an object"),
        (config(text_config={}), "config.json lacks 'max_position_embeddings'"),
        (config(text_config=TEXT | {"hidden_size": -8}), "hidden_size in config.json is -8"),
        (config(text_config=TEXT | {"hidden_size": 2**70}), "hidden_size in config.json"),
        (config(text_config=TEXT | {"hidden_size": "8"}), "hidden_size in config.json is '8'"),
        (config(text_config=TEXT | {"hidden_size": True}), "hidden_size in config.json is True"),
        (config(vision_config={"spatial_merge_size": 0}), "spatial_merge_size in config.json is 0"),
        (index(b'{"weight_map": {"a": "../other/model.safetensors"}}'), "not in this directory"),
        (index(b'{"weight_map": {"a": "/etc/passwd"}}'), "not in this directory"),
        (index(b'{"weight_map": {"a": ".."}}'), "not in this directory"),
        (index(b'{"weight_map": {"a": ""}}'), "not in this directory"),
        (put("config.json", b"[" + b"[]," * 4_200_000), "more than 4194304 values"),
        (config(text_config=TEXT | {"rope_scaling": [1]}), "rope_scaling in config.json is [1]"),
        (
            config(text_config=TEXT | {"rope_scaling": {"mrope_section": [1] * 9999}}),
            "mrope_section in config.json",
        ),
        (config(text_config=TEXT | {"rms_norm_eps": 0}), "rms_norm_eps in config.json is 0"),
        (config(vision_config={"fullatt_block_indexes": 5}), "fullatt_block_indexes in config"),
        (config(vision_config={"fullatt_block_indexes": None}), "fullatt_block_indexes in config"),
        (put("config.json", b'{"rope_theta": 1' + b"0" * 400 + b"}"), "rope_theta in config.json"),
        (weights({"a": ENTRY | {"shape": [3]}}, b"ab"), "which is not [3] of U8"),
        (weights({"a": ENTRY | {"shape": [1] * 9}}, b"ab"), "entry of a is malformed"),
        (weights({"a" * 5000: ENTRY}, b"ab"), "malformed"),
    ],
)
def test_what_is_wrong_is_told_by_name(
    model: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(model)
    with pytest.raises(BadCheckpoint) as caught:
        assert open_checkpoint(model).max_model_len
    assert len(str(caught.value)) < 1000
    assert said in str(caught.value) and str(model) in str(caught.value)


# Its fingerprint


def test_a_copy_has_the_same_fingerprint(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    assert open_checkpoint(copy).fingerprint == open_checkpoint(model).fingerprint


def save(**changed: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: save_file(TENSORS | changed, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: write(folder, config=NESTED | {"extra": 1}),
        lambda folder: write(folder, tokenizer={"extra": 1}),
        lambda folder: write(folder, tokenizer_config={"chat_template": "{{ messages }}"}),
        lambda folder: write(folder, preprocessor_config={"extra": 1}),
        lambda folder: write(folder, chat_template={"chat_template": "{{ messages }}"}),
        remove("generation_config.json"),
        shard,
        as_torch_file,
        save(c=np.zeros(1, np.float32)),
        save(a=TENSORS["a"].reshape(3, 2)),
        save(a=TENSORS["a"].astype(np.float64)),
        save(a=TENSORS["a"] + 1),
    ],
    ids=[
        "config",
        "tokenizer",
        "tokenizer config",
        "preprocessor",
        "template",
        "generation",
        "shards",
        "torch file",
        "name",
        "shape",
        "dtype",
        "values",
    ],
)
def test_another_model_has_another_fingerprint(model: Path, change: Callable[[Path], Any]) -> None:
    before = open_checkpoint(model).fingerprint
    change(model)
    assert open_checkpoint(model).fingerprint != before


def test_the_fingerprint_covers_the_weights_in_torch_files(model: Path) -> None:
    as_torch_file(model)
    before = open_checkpoint(model).fingerprint
    changed = TENSORS | {"a": TENSORS["a"] + 1}
    torch.save({name: torch.from_numpy(a) for name, a in changed.items()}, model / BIN)
    assert open_checkpoint(model).fingerprint != before


def test_files_that_are_no_part_of_the_model_do_not_change_its_fingerprint(model: Path) -> None:
    before = open_checkpoint(model).fingerprint
    (model / "README.md").write_text("words")
    assert open_checkpoint(model).fingerprint == before


def test_the_name_is_the_folders_however_it_is_called(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    assert open_checkpoint(".").name == "model"
    assert isinstance(open_checkpoint("."), Checkpoint)


def test_files_may_be_links_as_in_the_cache_of_a_hub(model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    model.rename(snapshot)
    for file in list(snapshot.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.tensors and checkpoint.fingerprint


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "chat_template.jinja",
    ],
)
@pytest.mark.parametrize("is_in_a_cache", [False, True])
def test_a_text_file_is_no_link_that_leads_out_of_the_directory(
    model: Path, tmp_path: Path, name: str, is_in_a_cache: bool
) -> None:
    """A cloned repository once had its chat template read from anywhere on the host."""
    if is_in_a_cache:
        (tmp_path / "repository" / "snapshots").mkdir(parents=True)
        model = model.rename(tmp_path / "repository" / "snapshots" / "0123")
    secret = tmp_path / "secret"
    if (model / name).exists():
        (model / name).rename(secret)
    else:
        secret.write_text('{"weight_map": {"a": "model.safetensors"}}')
    (model / name).symlink_to(secret)
    with pytest.raises(BadCheckpoint, match=f"{name} is a link to a file outside"):
        open_checkpoint(model)


def test_weights_may_be_links_to_anywhere(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(tmp_path / "weights")
    (model / "model.safetensors").symlink_to(tmp_path / "weights")
    assert open_checkpoint(model).tensors


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_or_a_device_is_not_read(model: Path, name: str) -> None:
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(BadCheckpoint, match=f"{name} is not a regular file"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        ("generation_config", {"temperature": -1}, "temperature in generation_config.json is -1"),
        ("generation_config", {"top_p": 2}, "top_p in generation_config.json is 2"),
        ("generation_config", {"top_k": 1.5}, "top_k in generation_config.json is 1.5"),
        ("generation_config", {"min_p": "x" * 999}, "min_p in generation_config.json is 'xxx"),
        ("generation_config", {"repetition_penalty": 0}, "repetition_penalty in generation"),
        ("generation_config", {"do_sample": 1}, "do_sample in generation_config.json is 1"),
        ("generation_config", {"eos_token_id": ["a"]}, "eos_token_id in generation_config.json"),
        ("generation_config", {"eos_token_id": [1] * 9999}, "eos_token_id in generation"),
        ("preprocessor_config", {"patch_size": 0}, "patch_size in preprocessor_config.json is 0"),
        ("preprocessor_config", {"max_pixels": 2.5}, "max_pixels in preprocessor_config.json"),
        ("preprocessor_config", {"size": []}, "size in preprocessor_config.json is []"),
        ("preprocessor_config", {"size": {"longest_edge": -1}}, "longest_edge in preprocessor"),
        ("preprocessor_config", {"image_std": [0, 1, 1]}, "image_std in preprocessor_config.json"),
        ("preprocessor_config", {"image_mean": "ab"}, "image_mean in preprocessor_config.json"),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_field(
    model: Path, file: str, fields: dict[str, Any], said: str
) -> None:
    write(model, **{file: fields})
    checkpoint = open_checkpoint(model)
    with pytest.raises(BadCheckpoint) as caught:
        assert getattr(checkpoint, file)
    assert said in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_a_number_that_is_too_large_is_not_infinite(model: Path, number: str) -> None:
    (model / "generation_config.json").write_text(f'{{"temperature": {number}}}')
    with pytest.raises(BadCheckpoint, match="temperature in generation_config"):
        assert open_checkpoint(model).generation_config


def test_a_checkpoint_is_read_in_any_locale(model: Path) -> None:
    write(model, config=NESTED | {"author": "Zoë"})
    (model / "config.json").write_bytes(
        (model / "config.json").read_bytes().decode("unicode_escape").encode()
    )
    program = f"from common.checkpoint import open_checkpoint; open_checkpoint({str(model)!r})"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", program], env=os.environ | locale, check=True)
