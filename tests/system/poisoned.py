"""`twinlens` whose services end when they work on a marked request.

    python -m tests.system.poisoned serve ...      the launcher, whose children run as
    python -m tests.system.poisoned ROLE ...       the service ROLE

The mark of a prompt is a text, for preprocess or for the language group. That of an image is its
colour. Each mark has a way to end: killed at once, or hung.
"""

import os
import runpy
import signal
import sys
import threading
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PREPROCESS_MARK = "☢☢"
LLM_MARKS = {"killed": "☠☠", "rank killed": "☣☣"}
COLOURS = {"killed": 77, "hung": 78}


def coloured(colour: int) -> bytes:
    """Return a picture whose pixels are all alike."""
    target = BytesIO()
    Image.new("RGB", (56, 56), (colour, colour, colour)).save(target, "PNG")
    return target.getvalue()


def end(how: str) -> None:
    """End this process, or another rank of its group, or hang."""
    match how:
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "rank killed":
            children = Path("/proc/self/task").glob("*/children")
            for pid in [int(pid) for path in children for pid in path.read_text().split()]:
                os.kill(pid, signal.SIGKILL)
    threading.Event().wait()


def has_mark(token_ids: np.ndarray, mark: list[int]) -> bool:
    if len(token_ids) < len(mark):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(token_ids, len(mark))
    return bool((windows == mark).all(axis=1).any())


def poison_preprocess() -> None:
    from services.preprocess.preprocessor import Preprocessor

    expand = Preprocessor.expand

    def poisoned(self: Preprocessor, token_ids: np.ndarray, items: Any) -> Any:
        if has_mark(token_ids, self.vocabulary.encode(PREPROCESS_MARK)):
            end("killed")
        return expand(self, token_ids, items)

    Preprocessor.expand = poisoned  # type: ignore[method-assign]


def poison_vision() -> None:
    from services.vision import tower_thread

    encode = tower_thread.encode

    def poisoned(tower: Any, key: Any, patches: Any, shape: Any) -> Any:
        pixels = patches.numpy()
        for how, colour in COLOURS.items():
            if (pixels == colour).all():
                end(how)
        return encode(tower, key, patches, shape)

    tower_thread.encode = poisoned


def poison_llm() -> None:
    from common.vocabulary import open_vocabulary
    from services.llm.model_runner import ModelRunner

    init = ModelRunner.__init__
    execute = ModelRunner.execute

    def poisoned_init(self: Any, checkpoint: Any, *arguments: Any) -> None:
        init(self, checkpoint, *arguments)
        vocabulary = open_vocabulary(checkpoint)
        self.marks = {how: vocabulary.encode(text) for how, text in LLM_MARKS.items()}

    def poisoned(self: Any, plan: Any, embeddings: Any) -> Any:
        for how, ids in self.marks.items():
            if has_mark(plan.token_ids, ids):
                end(how)
        return execute(self, plan, embeddings)

    ModelRunner.__init__ = poisoned_init  # type: ignore[method-assign]
    ModelRunner.execute = poisoned  # type: ignore[method-assign]


def run_service(role: str) -> None:
    from common import progress

    # A hang in the first work of a process is noticed as soon as any other.
    progress.UNMEASURED_SECONDS = 1.0
    poisons = {"preprocess": poison_preprocess, "vision": poison_vision, "llm": poison_llm}
    if role in poisons:
        poisons[role]()
    runpy.run_module(f"services.{role}", run_name="__main__")


def serve() -> None:
    from functools import partial

    from services import cli
    from services.launcher import launcher
    from services.launcher.child import Child, command_of

    def poisoned_command_of(child: Child, run_dir: Path) -> list[str]:
        python, _, _, *arguments = command_of(child, run_dir)
        return [python, "-m", "tests.system.poisoned", child.role, *arguments]

    launcher.Launcher = partial(  # type: ignore[misc, assignment]
        launcher.Launcher, command=poisoned_command_of
    )
    cli.main()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        run_service(sys.argv.pop(1))
