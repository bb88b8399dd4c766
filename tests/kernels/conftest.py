"""What holds for all tests of kernels."""

from typing import Any

import pytest

from compute.triton_kernels import is_installed


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
