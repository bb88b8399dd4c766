"""The checkpoints that benchmarks make have the layout of the published files."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.families import RECIPES
from tests.golden import GoldenCase

# Published files hold these, and the model does not read them.
UNREAD = ("relative_position_index", "position_ids", "logit_scale", "itc_")


def layout(names: list[str]) -> set[str]:
    """The names with N for the number of a layer."""
    return {re.sub(r"\.\d+\.", ".N.", name) for name in names}


def names_in(folder: Path) -> list[str]:
    names: list[str] = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names += opened.keys()
    for file in folder.glob("*.pt"):
        content = torch.load(file, weights_only=True)
        names += content.get("model", content)
    return [name for name in names if not any(part in name for part in UNREAD)]


@pytest.mark.parametrize(
    ("name", "family", "case"),
    [
        ("mid", "qwen2_5_vl", "a_image"),
        ("qwen-vl-mid", "qwen_vl", "b_long_ntk_logn"),
        ("wemm-mid", "wemm", "a_image"),
        ("vlmo-base", "vlmo", "vqa_base"),
        ("vlmo-base-plus", "vlmo", "vqa_base_plus"),
    ],
)
def test_a_made_checkpoint_has_the_tensors_of_a_published_one(
    name: str, family: str, case: str
) -> None:
    made = [tensor for tensor, _ in RECIPES[name].tensors()]
    assert layout(made) == layout(names_in(GoldenCase(case, family).checkpoint))
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_head_is_one_of_the_tensors(name: str) -> None:
    recipe = RECIPES[name]
    shapes = dict(recipe.tensors())
    if recipe.head in shapes:
        head = recipe.values(recipe.head, (300, 8))
        assert all(not head[rows].any() for rows in recipe.silent)
