"""The CLIP score: how well a caption fits its image, in the eyes of a CLIP model.

As in the accuracy tests of MindIE-LLM (clip_score_base_runner.py and coco_base_runner.py of
examples/atb_models/examples/models): the cosine between the embeddings of image and caption,
averaged over the images. It has no absolute target: the captions of two systems are compared.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from services.commands.client import ClientError
from services.commands.evaluation.clip_models import Similarity, check_clip, chosen_clip
from services.commands.evaluation.data import BadData
from services.commands.evaluation.prompts import by_family
from services.commands.evaluation.records import write
from services.commands.evaluation.task import Answered, Item, Row, Scores, Task, mean

PROMPT = "Generate the caption in English with grounding:"
CAPTIONS = "captions.json"
SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".gif"])
MARKUP = re.compile(r"<(box|quad)>.*?</\1>|</?ref>", re.DOTALL)
"""What Qwen-VL writes around and after the things that it names in a caption."""


def load(arguments: argparse.Namespace) -> list[Item]:
    """Return an item for each image of a folder. Its id is the file's name."""
    check_clip(arguments)
    folder: Path = arguments.data
    if not folder.is_dir():
        raise BadData(f"{folder}: expected a folder of images")
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
    return [Item(path.name, (path.read_bytes, arguments.prompt), path) for path in files]


def score(answered: Sequence[Answered], arguments: argparse.Namespace) -> Scores:
    """Write the captions, and score them if a CLIP model is given."""
    captions = {one.item.id: one.output for one in answered if not one.failed}
    file: Path = arguments.out / CAPTIONS
    try:
        write(file, json.dumps(captions, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise ClientError(f"cannot write {file}: {error.strerror}") from error
    model = chosen_clip(arguments)
    if model is None:
        note = f"no score: for one, set --answers {file}, another --out, and --clip or --open-clip"
        return Scores([], [{} for _ in answered], notes=[note])
    parts = [{"cosine": similarity(model, one, arguments)} for one in answered]
    values = [part["cosine"] for part in parts]
    row = Row("clip-score", len(values), len(captions), "cosine", mean(values))
    return Scores([row], parts, notes=[f"judged by {model.name}", rule(arguments)])


def similarity(model: Similarity, one: Answered, arguments: argparse.Namespace) -> float:
    """Return the cosine of an image and its caption; 0 if there is none."""
    if one.failed:
        return 0.0
    caption = without_markup(one.output) if arguments.strip_markup else one.output
    try:
        return model.cosine(one.item.target, caption)
    except OSError as error:
        raise BadData(f"{one.item.target}: expected an image ({error})") from error


def without_markup(caption: str) -> str:
    """Return a caption without boxes and the marks around what they belong to."""
    return " ".join(MARKUP.sub("", caption).split())


def rule(arguments: argparse.Namespace) -> str:
    text = "without <ref>, <box> and <quad>" if arguments.strip_markup else "as they were answered"
    return f"captions are compared {text}, cut at the tokens that the model takes (77 in CLIP)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clip",
        type=Path,
        metavar="DIR",
        help="score with a CLIP model in Hugging Face's layout (extra `reference`)",
    )
    parser.add_argument(
        "--open-clip",
        type=Path,
        metavar="FILE",
        help="score with open_clip's ViT-H-14 and this file of its weights "
        "(open_clip_pytorch_model.bin of laion/CLIP-ViT-H-14-laion2B-s32B-b79K)",
    )
    parser.add_argument(
        "--strip-markup", action="store_true", help="score captions without boxes and their marks"
    )


CLIP_SCORE = Task(
    name="clip-score",
    help="captions of images, and how well they fit by a CLIP model",
    data="folder of images",
    prompt=by_family(PROMPT),
    load=load,
    score=score,
    max_tokens=256,
    add_arguments=add_arguments,
)
