"""The README's table of models says what the code can do."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint import open_checkpoint
from common.families.family import TP_SIZES
from common.messages import Task
from common.settings import LlmSettings
from tests.golden import GoldenCase
from tests.policy.sources import ROOT

HEADER = (
    "| model | `--tp` | dtypes | image | video | text alone "
    "| streamed | guided | `int8` | service |"
)
SERVICES: dict[Task, str] = {
    "generate": "chat completions; gRPC `Generate`",
    "classify": "classify, chat completions; gRPC `Classify`",
    "embed": "embeddings; gRPC `Embed`",
}


@dataclass(frozen=True)
class Model:
    """A published model: its sizes, where they differ from those of a golden case."""

    title: str
    case: GoldenCase
    sizes: dict[str, Any]


def qwen25(title: str, layers: int, hidden: int, heads: int, kv: int, inner: int) -> Model:
    sizes = {"num_heads": heads, "num_kv_heads": kv, "intermediate_size": inner, "head_dim": 128}
    more = {"vocab_size": 152064, "hidden_size": hidden, "num_layers": layers}
    return Model(title, GoldenCase("e_video"), sizes | more)


def vlmo(title: str, case: str, width: int, heads: int) -> Model:
    sizes = {
        "hidden_size": width,
        "num_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": 30522,
    }
    return Model(title, GoldenCase(case, "vlmo"), sizes)


QWEN_VL = {"num_heads": 32, "num_kv_heads": 32, "intermediate_size": 11008, "vocab_size": 151936}
WEMM = {"num_heads": 32, "num_kv_heads": 8, "intermediate_size": 14336, "vocab_size": 92544}
MODELS = (
    qwen25("Qwen2.5-VL-3B", 36, 2048, 16, 2, 11008),
    qwen25("Qwen2.5-VL-7B, RolmOCR, olmOCR", 28, 3584, 28, 4, 18944),
    qwen25("Qwen2.5-VL-32B", 64, 5120, 40, 8, 27648),
    Model("Qwen-VL, Qwen-VL-Chat", GoldenCase("a_chat_image", "qwen_vl"), QWEN_VL),
    Model("WeMM-Chat-2k-CN", GoldenCase("a_image", "wemm"), WEMM),
    vlmo("VLMo base, for questions", "vqa_base", 768, 12),
    vlmo("VLMo base_plus, for questions", "vqa_base_plus", 544, 16),
    vlmo("VLMo large, for questions", "vqa_base", 1024, 16),
    vlmo("VLMo base, for retrieval", "retrieval_base", 768, 12),
)


def row_of(model: Model) -> str:
    """Return the line that the README must have for a model."""
    checkpoint = open_checkpoint(model.case.checkpoint)
    family = checkpoint.family
    sizes = replace(checkpoint.sizes, **model.sizes)
    tasks = family.tasks_of(checkpoint)
    generates = "generate" in tasks
    kinds = family.placeholder_ids(checkpoint)
    settings = {field.name: field for field in LlmSettings.__dataclass_fields__.values()}
    dtypes = [name for name in settings["dtype"].metadata["choices"] if name != "auto"]
    cells = [
        model.title,
        ", ".join(str(size) for size in TP_SIZES if sizes.fits(size)),
        ", ".join(dtypes),
        yes("image" in kinds),
        yes("video" in kinds),
        yes("classify" not in tasks),
        yes(generates),
        yes(generates),
        yes(generates),
        SERVICES[tasks[0]],
    ]
    return "| " + " | ".join(cells) + " |"


def yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def table_of(file: Path) -> list[str]:
    """Return the rows of the README's table."""
    lines = file.read_text().splitlines()
    first = lines.index(HEADER) + 2
    return lines[first : next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.title)
def test_the_readme_says_what_a_model_can_do(model: Model) -> None:
    assert row_of(model) in table_of(ROOT / "README.md")


def test_the_readme_lists_no_other_model() -> None:
    assert len(table_of(ROOT / "README.md")) == len(MODELS)
