"""The checkpoints that benchmarks make, one file per model family."""

from benchmarks.families import qwen2_5_vl, qwen_vl, vlmo, wemm
from benchmarks.recipe import Recipe

RECIPES: dict[str, Recipe] = qwen2_5_vl.RECIPES | qwen_vl.RECIPES | wemm.RECIPES | vlmo.RECIPES
"""How each checkpoint is made, by its name."""
