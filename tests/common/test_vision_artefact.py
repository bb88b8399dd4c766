"""The manifest of a compiled tower: what is missing, damaged or foreign is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint import BadCheckpoint, open_checkpoint
from common.config import BadSetting
from common.vision_artefact import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    CompiledProgram,
    Manifest,
    VisionArtefact,
    check_artefact_settings,
    copy_model_files,
    hashes_of,
    open_artefact,
    tower_tensors,
    write_manifest,
)
from tests.golden import GoldenCase

MODEL = GoldenCase("a_image").checkpoint
PROGRAM = {"name": "8", "num_patches": 8, "length": 8, "inputs": [], "plan_values": ""}
SETTINGS = {"vision_buckets": "", "simulate_vision_ms": None, "dtype": "auto"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artefact whose compiler wrote one file, `program`."""
    path = tmp_path / "artefact"
    path.mkdir()
    checkpoint = open_checkpoint(MODEL)
    (path / "program").write_bytes(b"compiled")
    names = [*copy_model_files(checkpoint, path), "program"]
    manifest = Manifest(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        compiler="none",
        compiler_version="1",
        model=checkpoint.name,
        family=checkpoint.family.model_type,
        fingerprint=checkpoint.fingerprint,
        dtype="bfloat16",
        values_per_patch=588,
        column_widths=(100, 28),
        programs=(
            CompiledProgram("60", 60, 64, (), ""),
            CompiledProgram("128", 128, 128, (), ""),
            CompiledProgram("128-1", 128, 128, (), "other"),
        ),
        tensors=tower_tensors(checkpoint),
        files=hashes_of(path, names),
    )
    write_manifest(path, manifest)
    return path


def change(folder: Path, **fields: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | fields))


def test_it_is_opened_without_the_model(folder: Path) -> None:
    artefact = open_artefact(folder)
    checkpoint = open_checkpoint(MODEL)
    assert artefact.buckets == (60, 128)
    assert artefact.checkpoint.fingerprint == checkpoint.fingerprint
    assert artefact.checkpoint.vision_config == checkpoint.vision_config
    assert artefact.checkpoint.name == "checkpoint"
    assert artefact.file("program").read_bytes() == b"compiled"
    shapes = {name: info.shape for name, info in artefact.checkpoint.tensors.items()}
    assert shapes["visual.blocks.0.attn.qkv.weight"] == (192, 64)
    assert not any(name.startswith("model.") for name in shapes), "only the tower's"


def test_a_folder_without_a_manifest_is_none(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="twinlens compile"):
        open_artefact(tmp_path)
    with pytest.raises(BadCheckpoint, match="twinlens compile"):
        open_artefact(MODEL)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": "other"}, "not the manifest"),
        ({"format_version": 2}, "version 2 of the format.*compile the model again"),
        ({"fingerprint": 1}, "damaged.*fingerprint"),
        ({"more": 1}, "damaged.*more"),
        ({"family": "other"}, "'other', which is not supported"),
        ({"family": "../x"}, "not supported"),
        ({"dtype": "code"}, "dtype"),
        ({"programs": []}, "order of their patches"),
        ({"programs": [PROGRAM, PROGRAM | {"num_patches": 4}]}, "order of their patches"),
        ({"programs": [PROGRAM | {"length": 4}]}, "8 patches do not fit into 4"),
        ({"programs": [PROGRAM | {"name": "../x"}]}, "not in its folder"),
        ({"column_widths": []}, "columns"),
        ({"column_widths": [64, -1]}, "columns"),
        ({"files": {"../config.json": "0"}}, "not in its folder"),
        ({"files": {}}, r"names no config\.json"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(
    folder: Path, fields: dict[str, Any], words: str
) -> None:
    change(folder, **fields)
    with pytest.raises(BadCheckpoint, match=words):
        open_artefact(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": NaN}', "{" * 10000])
def test_what_is_not_json_is_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(BadCheckpoint, match=r"manifest\.json"):
        open_artefact(folder)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_changed_configuration_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text((folder / name).read_text() + " ")
    with pytest.raises(BadCheckpoint, match=f"{name} is damaged"):
        open_artefact(folder)


def test_a_changed_program_is_refused_before_it_is_loaded(folder: Path) -> None:
    (folder / "program").write_bytes(b"changed")
    with pytest.raises(BadCheckpoint, match="program is damaged"):
        open_artefact(folder).file("program")


@pytest.mark.parametrize("name", ["config.json", "program"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BadCheckpoint, match=f"{name} is missing"):
        open_artefact(folder)


def test_a_file_that_the_manifest_does_not_name_is_not_read(folder: Path) -> None:
    (folder / "other").write_bytes(b"")
    with pytest.raises(BadCheckpoint, match="other is missing"):
        open_artefact(folder).file("other")


def test_a_link_that_leads_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "config.json", tmp_path / "secret.json")
    (folder / "config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(BadCheckpoint, match="link"):
        open_artefact(folder)


def allow(artefact: VisionArtefact, fingerprint: str | None = None, **changed: object) -> None:
    check_artefact_settings(artefact, SETTINGS | changed, fingerprint)


def test_settings_that_go_with_it_are_accepted(folder: Path) -> None:
    artefact = open_artefact(folder)
    allow(artefact)
    allow(artefact, artefact.manifest.fingerprint, dtype="bfloat16")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"vision_buckets": "64"}, r"--vision-buckets.*\(60,128\)"),
        ({"simulate_vision_ms": 0.0}, "--simulate-vision-ms"),
        ({"dtype": "float32"}, "--dtype float32.*bfloat16"),
        ({"fingerprint": "other"}, "another model"),
    ],
)
def test_settings_that_say_otherwise_are_refused_by_their_flag(
    folder: Path, changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadSetting, match=words):
        allow(open_artefact(folder), **changed)


def refused_after(folder: Path, damage: Callable[[], object]) -> None:
    damage()
    with pytest.raises(BadCheckpoint):
        open_artefact(folder)


def test_a_configuration_of_another_family_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "other"}
    (folder / "config.json").write_text(json.dumps(config))
    manifest = json.loads((folder / MANIFEST).read_text())
    files = manifest["files"] | hashes_of(folder, ["config.json"])
    refused_after(folder, lambda: change(folder, files=files))
