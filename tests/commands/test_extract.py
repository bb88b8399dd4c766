"""`twinlens extract-embeddings` writes the table that others read, and ours serves from it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.checkpoint import BadCheckpoint, open_checkpoint
from common.families import FAMILIES
from common.families.family import TP_SIZES
from common.settings import ExtractSettings
from common.sizing import Footprint
from services.commands import extract as module
from services.commands.extract import extract, to_float16
from services.llm import families as language_families
from services.llm.families import load
from services.llm.model_runner import ModelRunner
from services.llm.parallel import Shard
from tests.golden import GoldenCase, max_difference
from tests.llm.test_model_runner import BLOCK_SIZE, CPU, NUM_BLOCKS, ThreadGroup, forced_logits
from tests.toy_family import language
from tests.toy_family.checkpoint import make_checkpoint
from tests.toy_family.description import Toy

TIED = GoldenCase("b_two_images_tied")
UNTIED = GoldenCase("c_gqa_tp8")


def stored(checkpoint: Path) -> torch.Tensor:
    """Return the embeddings of a checkpoint as float16."""
    opened = open_checkpoint(checkpoint)
    (name, shape) = opened.embedding_table
    info = opened.tensors[name]
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[info.dtype]
    data = bytearray(info.file.read_bytes()[info.offset : info.offset + info.num_bytes])
    return torch.frombuffer(data, dtype=dtype).view(shape).half()


@pytest.mark.parametrize("case", [TIED, UNTIED, GoldenCase("a_image")], ids=lambda case: case.name)
def test_the_file_is_the_table_in_float16(
    case: GoldenCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    assert extract(ExtractSettings(model=str(case.checkpoint), out=str(tmp_path / "new"))) == 0
    (file,) = (tmp_path / "new").iterdir()
    assert file.name == "embed_tokens.bin"
    found = np.fromfile(file, np.float16).reshape(stored(case.checkpoint).shape)
    assert max_difference(found, stored(case.checkpoint).numpy()) == 0


def test_the_model_directory_is_where_it_goes(tmp_path: Path) -> None:
    model = shutil.copytree(UNTIED.checkpoint, tmp_path / "model")
    before = open_checkpoint(model).fingerprint
    assert extract(ExtractSettings(model=str(model))) == 0
    assert (model / "embed_tokens.bin").exists()
    assert open_checkpoint(model).fingerprint == before


def test_numbers_are_rounded_as_torch_rounds_them() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) ** 9
    assert (to_float16(values.numpy()) == values.half().numpy()).all()
    bits = values.bfloat16().view(torch.uint16).numpy()
    assert (to_float16(bits) == values.bfloat16().half().numpy()).all()


def test_values_beyond_float16_are_refused_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(GoldenCase("a_image").checkpoint, tmp_path / "model")
    name, shape = open_checkpoint(model).embedding_table
    save_file({name: torch.full(shape, 1e6)}, model / "model.safetensors")
    assert extract(ExtractSettings(model=str(model))) == 2
    assert "values that float16 cannot hold" in capsys.readouterr().err
    assert not [file for file in model.iterdir() if "embed" in file.name]


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    settings = ExtractSettings(model=str(UNTIED.checkpoint), out=str(tmp_path / "file" / "x"))
    assert extract(settings) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


# Serving from it


def logits(case: GoldenCase, embeddings: Path | None, shard: Shard = Shard()) -> np.ndarray:
    checkpoint = open_checkpoint(case.checkpoint, str(embeddings or ""))
    runner = ModelRunner(checkpoint, torch.float32, CPU, NUM_BLOCKS, BLOCK_SIZE, shard=shard)
    return forced_logits(runner, case, 33)


@pytest.fixture(params=[TIED, UNTIED], ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return request.param


@pytest.fixture
def folder(case: GoldenCase, tmp_path: Path) -> Path:
    assert extract(ExtractSettings(model=str(case.checkpoint), out=str(tmp_path))) == 0
    return tmp_path


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_answers_are_the_same(case: GoldenCase, folder: Path, world_size: int) -> None:
    for found in ThreadGroup(world_size).run(lambda shard: logits(case, folder, shard)):
        assert max_difference(found, case.tensors["greedy_logits"]) < 1e-3


@pytest.mark.parametrize("name", ["embed_tokens.bin", "emb_tokens.bin", "mine.bin"])
def test_the_rows_come_from_the_file(case: GoldenCase, folder: Path, name: str) -> None:
    table = np.fromfile(folder / "embed_tokens.bin", np.float16)
    (folder / "embed_tokens.bin").unlink()
    (2 * table).tofile(folder / name)
    file = folder / name if name == "mine.bin" else folder
    plain = load(open_checkpoint(case.checkpoint), torch.float32, CPU)
    doubled = load(open_checkpoint(case.checkpoint, str(file)), torch.float32, CPU)
    ids = torch.arange(0, 400, 7)
    assert max_difference(doubled.embed(ids).numpy(), 2 * plain.embed(ids).numpy()) < 1e-4
    assert open_checkpoint(case.checkpoint, str(file)).fingerprint == (
        open_checkpoint(case.checkpoint).fingerprint
    )


def test_a_rank_reads_its_rows(folder: Path, case: GoldenCase) -> None:
    checkpoint = open_checkpoint(case.checkpoint, str(folder))
    for world_size in filter(checkpoint.sizes.fits, TP_SIZES):
        shard = Shard(world_size - 1, world_size)
        read = load(checkpoint, torch.bfloat16, CPU, shard).num_bytes_read
        assert Footprint(checkpoint, 2).rank_bytes(world_size) == read


def test_another_family_serves_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", Toy())
    monkeypatch.setitem(language_families.FAMILIES, "toy", language.load)
    model = make_checkpoint(tmp_path / "model")
    assert extract(ExtractSettings(model=str(model))) == 0
    table = np.fromfile(model / "embed_tokens.bin", np.float16).reshape(320, 32)
    served = load(open_checkpoint(model, str(model)), torch.float32, CPU)
    assert max_difference(served.embed(torch.arange(320)).numpy(), table.astype(np.float32)) == 0


@pytest.mark.parametrize(
    ("family", "name"),
    [("qwen_vl", "a_chat_image"), ("qwen_vl", "b_long_ntk_logn"), ("wemm", "a_image")],
)
def test_every_family_serves_from_it(family: str, name: str, tmp_path: Path) -> None:
    model = GoldenCase(name, family).checkpoint
    assert extract(ExtractSettings(model=str(model), out=str(tmp_path))) == 0
    file = tmp_path / "embed_tokens.bin"
    (2 * np.fromfile(file, np.float16)).tofile(file)
    plain, doubled = (
        ThreadGroup(2).run(
            lambda shard, given=given: (
                load(open_checkpoint(model, given), torch.float32, CPU, shard)
                .embed(torch.arange(500))
                .numpy()
            )
        )
        for given in ("", str(tmp_path))
    )
    assert max_difference(doubled[1], 2 * plain[0]) < 1e-4


def test_a_table_of_another_size_is_refused(case: GoldenCase, folder: Path) -> None:
    with (folder / "embed_tokens.bin").open("ab") as f:
        f.write(b"\0\0")
    with pytest.raises(BadCheckpoint, match=r"has \d+ bytes, but the model's embeddings of shape"):
        open_checkpoint(case.checkpoint, str(folder))


@pytest.mark.parametrize("name", ["", "nothing.bin"])
def test_no_table_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadCheckpoint, match=r"no embeddings at .*extract-embeddings"):
        open_checkpoint(UNTIED.checkpoint, str(tmp_path / name))
