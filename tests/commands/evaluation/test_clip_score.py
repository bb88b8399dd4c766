"""Captions of images, and their score by a small CLIP model with random weights."""

import json
from pathlib import Path

import pytest

from services.commands.evaluation.clip_score import without_markup
from services.commands.evaluation.command import evaluate
from tests.commands.evaluation.endpoint import endpoint, last_line, parse, png, run

CAPTION = "<ref>a cat</ref><box>(1,2),(3,4)</box> sits."


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(80 * number))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model in Hugging Face's layout, of a few kilobytes."""
    transformers = pytest.importorskip("transformers", reason="needs the extra `reference`")
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    tower |= {"num_hidden_layers": 1}
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    ids = {"vocab_size": len(tokens), "bos_token_id": len(tokens) - 2}
    ids |= {"eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    torch.manual_seed(0)
    transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=tower | ids | {"max_position_embeddings": 9},
            vision_config=tower | {"image_size": 8, "patch_size": 4},
            projection_dim=8,
        )
    ).save_pretrained(folder)
    vocabulary = folder.parent / "vocab.json"
    vocabulary.write_text(json.dumps({token: id for id, token in enumerate(tokens)}))
    (folder.parent / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8),
        transformers.CLIPTokenizer.from_pretrained(folder.parent),
    ).save_pretrained(folder)
    return folder


def expected(clip: Path, image: Path, text: str) -> float:
    """The cosine, computed step by step from the towers."""
    import torch
    import transformers
    from PIL import Image

    model = transformers.CLIPModel.from_pretrained(clip)
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    pixels = processor.image_processor(Image.open(image).convert("RGB"), return_tensors="pt")
    ids = processor.tokenizer([text], return_tensors="pt", truncation=True, max_length=9)
    with torch.inference_mode():
        seen = model.visual_projection(model.vision_model(**pixels).pooler_output)[0]
        read = model.text_projection(model.text_model(**ids).pooler_output)[0]
    return float(seen @ read / (seen.norm() * read.norm()))


async def test_captions_are_written_without_a_model_that_judges(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    async with endpoint(lambda text, images: CAPTION) as fake:
        assert await run(fake, "clip-score", "--data", images, "--out", out) == 0
    assert fake.texts == ["<image>Generate the caption in English with grounding:"] * 3
    captions = json.loads((out / "captions.json").read_text())
    assert captions == {f"{number}.png": CAPTION for number in range(3)}
    printed = capsys.readouterr().out
    assert last_line(printed)["scores"] == {}
    assert "no score" in printed


def test_a_file_that_is_no_image_is_named(
    images: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "0.png").write_text("no image")
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"0.png": CAPTION}))
    command = ("clip-score", "--data", str(images), "--answers", str(captions))
    assert evaluate(parse(*command, "--clip", str(clip), "--out", str(tmp_path / "out"))) == 1
    assert "0.png: expected an image" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--strip-markup",)])
def test_given_captions_are_scored(
    images: Path,
    clip: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
) -> None:
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"0.png": CAPTION, "2.png": "dog"}))
    command = ("clip-score", "--data", str(images), "--answers", str(captions))
    out = ("--out", str(tmp_path / "out"))
    assert evaluate(parse(*command, "--clip", str(clip), *out, *flags)) == 0
    printed = capsys.readouterr().out
    first = "a cat sits." if flags else CAPTION
    values = [expected(clip, images / "0.png", first), expected(clip, images / "2.png", "dog")]
    assert last_line(printed)["scores"]["clip-score, cosine"] == pytest.approx(sum(values) / 2)
    assert "judged by tiny-clip (transformers)" in printed
    assert ("without <ref>" in printed) == bool(flags)


def test_markup() -> None:
    grounded = "<ref>Two cats</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box> on <quad>x</quad>it"
    assert without_markup(grounded) == "Two cats on it"


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (("--clip", "nowhere"), "expected the folder of a CLIP model"),
        (("--open-clip", "nowhere"), "open_clip"),
        (("--clip", "a", "--open-clip", "b"), "not both"),
    ],
)
async def test_a_model_that_cannot_judge_is_refused_before_anything_is_asked(
    images: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], advice: str
) -> None:
    async with endpoint(lambda text, images: CAPTION) as fake:
        assert await run(fake, "clip-score", "--data", images, "--out", images / "o", *flags) == 1
    assert advice in capsys.readouterr().err
    assert not fake.bodies
