"""`twinlens` with the toy family: python -m tests.toy_family.serve serve --model ..."""

from functools import partial
from pathlib import Path

from common.families import FAMILIES
from services import cli
from services.launcher import launcher
from services.launcher.child import Child, command_of
from tests.toy_family.description import MODEL_TYPE, Toy


def toy_command_of(child: Child, run_dir: Path) -> list[str]:
    """The command of a child, run by `tests.toy_family.run`."""
    python, _, _, *arguments = command_of(child, run_dir)
    return [python, "-m", "tests.toy_family.run", child.role, *arguments]


if __name__ == "__main__":
    FAMILIES[MODEL_TYPE] = Toy()
    launcher.Launcher = partial(launcher.Launcher, command=toy_command_of)  # type: ignore[misc, assignment]
    cli.main()
