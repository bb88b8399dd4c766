"""What holds for all tests of kernels.

On a machine with a card, the kernels are compiled and run there. Elsewhere Triton's interpreter
runs them on the CPU.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from compute.triton_kernels import is_installed


@pytest.fixture
def tensors_are_on_the_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make new tensors and generators on the card, if there is one."""
    if not torch.cuda.is_available():
        yield
        return
    monkeypatch.setattr(torch, "Generator", partial(torch.Generator, "cuda"))
    with torch.device("cuda"):
        yield


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run kernels in a fraction of the time.

    Triton's interpreter prepares its language at each call of a function in a kernel. Once for each
    module and launch is enough.
    """
    if is_installed():
        prepare_once(monkeypatch)


def prepare_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter  # an extra

    prepare = interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__
    prepared: set[str] = set()

    def prepare_new(function: Any) -> Any:
        if function.__module__ in prepared:
            return None
        prepared.add(function.__module__)
        return prepare(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        prepared.clear()
        launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter, "_patch_lang", prepare_new)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
