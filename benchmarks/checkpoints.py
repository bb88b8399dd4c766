"""Make checkpoints of random weights, complete enough to be served like any other."""

import shutil
from pathlib import Path

from benchmarks.families import RECIPES


def make(name: str, folder: Path) -> Path:
    """Return the checkpoint of that name in the folder, and make it first if it is missing."""
    path = folder / name
    recipe = RECIPES[name]
    if path.exists():
        return path
    unfinished = folder / f"{name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    recipe.write_files(unfinished)
    recipe.write_weights(unfinished, recipe)
    return unfinished.rename(path)


def find(name: str, folder: Path) -> str:
    """Return the path of one of the known checkpoints, or a model directory as it is named."""
    return str(make(name, folder)) if name in RECIPES else name
