"""VLMo's directories: what the tensors show, and what is refused."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint import BadCheckpoint, TensorInfo, open_checkpoint
from common.families.family import TP_SIZES, ModelSizes
from common.families.vlmo import CONFIG, LABELS, Vlmo, grid_side, max_text_len, patch_size
from tests.golden import GoldenCase


def copy(folder: Path, name: str = "vqa_base") -> Path:
    return shutil.copytree(GoldenCase(name, "vlmo").checkpoint, folder / name)


def change_config(folder: Path, **values: object) -> None:
    file = folder / CONFIG
    file.chmod(0o600)
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def sizes_of(folder: Path) -> tuple[ModelSizes, int, int, int]:
    checkpoint = open_checkpoint(folder)
    return (
        checkpoint.sizes,
        grid_side(checkpoint),
        patch_size(checkpoint),
        max_text_len(checkpoint),
    )


@pytest.mark.parametrize("name", ["vqa_base", "retrieval_base"])
def test_the_tensors_alone_show_the_sizes(tmp_path: Path, name: str) -> None:
    folder = copy(tmp_path, name)
    said = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).unlink()
    sizes, side, patch, text_len = sizes_of(folder)
    assert (side * patch, patch, text_len) == (said["image_size"], said["patch_size"], 40)
    assert (sizes.hidden_size, sizes.num_layers, sizes.num_heads, sizes.vocab_size) == (
        said["embed_dim"],
        said["depth"],
        said["num_heads"],
        said["vocab_size"],
    )


def test_a_file_that_does_not_show_its_heads_needs_a_configuration(tmp_path: Path) -> None:
    folder = copy(tmp_path, "vqa_base_plus")
    (folder / CONFIG).unlink()
    with pytest.raises(BadCheckpoint, match="num_heads"):
        open_checkpoint(folder).sizes  # noqa: B018


@dataclass(frozen=True)
class Shapes:
    """A published model as far as its shapes tell: without values."""

    tensors: dict[str, TensorInfo]
    path: Path = Path("/nowhere")


@pytest.mark.parametrize(
    ("width", "depth", "table", "positions", "heads", "side", "tp_sizes"),
    [
        (768, 12, (3878, 144), None, 12, 30, [1, 2, 4]),
        (768, 12, (2606, 144), None, 12, 24, [1, 2, 4]),
        (1024, 24, (3878, 384), None, 16, 30, [1, 2, 4, 8]),
        (544, 24, None, (1, 901, 544), 16, 30, [1, 2, 4, 8]),
    ],
    ids=["base", "base at 384", "large", "base_plus"],
)
def test_the_sizes_of_the_published_models(
    width: int,
    depth: int,
    table: tuple[int, ...] | None,
    positions: tuple[int, ...] | None,
    heads: int,
    side: int,
    tp_sizes: list[int],
) -> None:
    shapes: dict[str, tuple[int, ...] | None] = {
        "text_embeddings.word_embeddings.weight": (30522, width),
        "transformer.blocks.0.mlp_text.fc1.weight": (4 * width, width),
        "relative_position_bias_table": table,
        "transformer.pos_embed": positions,
    }
    shapes |= {f"transformer.blocks.{i}.norm1.weight": (width,) for i in range(depth)}
    infos = {
        name: TensorInfo(Path("f"), "F32", shape, 0, 0) for name, shape in shapes.items() if shape
    }
    checkpoint: Any = Shapes(infos)
    sizes = Vlmo().sizes(checkpoint)
    assert (sizes.num_layers, sizes.num_heads, grid_side(checkpoint)) == (depth, heads, side)
    assert [size for size in TP_SIZES if sizes.fits(size)] == tp_sizes
    if 8 not in tp_sizes:
        with pytest.raises(BadCheckpoint, match=r"12 heads and an MLP of 3072 .* --tp 1, 2, 4$"):
            sizes.check_fits(8)


def test_requests_pass_neither_vision_nor_a_detokenizer() -> None:
    for name, task in (("vqa_base", "classify"), ("retrieval_base", "embed")):
        checkpoint = open_checkpoint(GoldenCase(name, "vlmo").checkpoint)
        assert checkpoint.family.tasks_of(checkpoint) == (task,)
        assert checkpoint.family.stages_of(checkpoint) == ("preprocess", "llm")
        assert checkpoint.sizes.kv_bytes_per_token(1, 4) == 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image_size": 128}, "image_size in vlmo_config.json is 128, but the weights are of 64"),
        ({"depth": 4}, "depth in vlmo_config.json is 4, but the weights are of 5"),
        ({"num_heads": 7}, "num_heads"),
        ({"num_heads": "8"}, "num_heads"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    tmp_path: Path, values: dict[str, object], words: str
) -> None:
    folder = copy(tmp_path)
    change_config(folder, **values)
    with pytest.raises(BadCheckpoint, match=words):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (None, "lacks answer2label.txt"),
        (['{"answer": "yes", "label": 0}'], "must name each of the 31 labels"),
        (['{"answer": "yes", "label": 0}'] * 31, "must name each of the 31 labels"),
        (['{"answer": "yes"}'], "no answer with its label"),
        (["[1]"], "no answer with its label"),
        (["[" * 10**5], "no answer with its label"),
    ],
)
def test_labels_must_be_those_of_the_classifier(
    tmp_path: Path, lines: list[str] | None, words: str
) -> None:
    file = copy(tmp_path) / LABELS
    file.unlink()
    if lines is not None:
        file.write_text("\n".join(lines))
    with pytest.raises(BadCheckpoint, match=words):
        open_checkpoint(file.parent)


def test_a_second_model_in_the_directory_is_refused(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    (file,) = folder.glob("*.pt")
    shutil.copyfile(file, folder / "other.pt")
    with pytest.raises(BadCheckpoint, match="leave one model there"):
        open_checkpoint(folder)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = copy(tmp_path)
    (file,) = folder.glob("*.pt")
    weights = torch.load(file, weights_only=True)
    file.unlink()
    torch.save(weights | {"adapter.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(BadCheckpoint, match=r"adapter\.weight is no tensor of VLMo"):
        open_checkpoint(folder)
    headless = {name: t for name, t in weights.items() if not name.startswith(("vqa", "itc"))}
    torch.save(headless, file)
    with pytest.raises(BadCheckpoint, match="neither a classifier"):
        open_checkpoint(folder)
