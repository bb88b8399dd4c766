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
from safetensors.numpy import save_file

from common.checkpoint import MAX_JSON_BYTES, BadCheckpoint, Checkpoint, open_checkpoint
from tests.golden import CASES, ROOT

TEXT = {"hidden_size": 8, "max_position_embeddings": 64, "eos_token_id": 3}
VISION = {"depth": 2}
PUBLISHED = {"model_type": "qwen2_5_vl", "torch_dtype": "bfloat16", "vision_config": VISION, **TEXT}
NESTED = {
    "model_type": "qwen2_5_vl",
    "dtype": "float32",
    "vision_config": VISION,
    "text_config": TEXT,
}
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


@pytest.mark.parametrize("cut", [lambda folder: None, shard], ids=["one file", "shards"])
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
    checkpoint = open_checkpoint(ROOT / name / "checkpoint")
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


def test_a_weight_file_may_be_a_link_as_in_the_cache_of_a_hub(model: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    (model / "model.safetensors").rename(blob)
    (model / "model.safetensors").symlink_to(blob)
    assert open_checkpoint(model).tensors


def test_a_checkpoint_is_read_in_any_locale(model: Path) -> None:
    write(model, config=NESTED | {"author": "Zoë"})
    (model / "config.json").write_bytes(
        (model / "config.json").read_bytes().decode("unicode_escape").encode()
    )
    program = f"from common.checkpoint import open_checkpoint; open_checkpoint({str(model)!r})"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", program], env=os.environ | locale, check=True)
