"""Imports point proto <- common <- compute <- one service, and services never import each other.

Only vision and llm import compute. The launcher and the commands import no service.
"""

import ast
from pathlib import Path

import pytest

from tests.policy.sources import PACKAGES, imports, parse, sources

COMPUTING = ("vision", "llm")
"""The services that may import `compute`, and torch with it."""


def allowed(file: Path) -> tuple[str, ...]:
    """What of ours the file may import."""
    match file.with_suffix("").parts:
        case ("proto", *_):
            return ("proto",)
        case ("common", *_):
            return ("proto", "common")
        case ("compute", *_):
            return ("proto", "common", "compute")
        case ("services", "cli"):
            return ("proto", "common", "services.launcher", "services.commands")
        case ("services", "launcher", *_):
            return ("proto", "common", "services.launcher", "services.commands")
        case ("services", service, *_) if service in COMPUTING:
            return ("proto", "common", "compute", f"services.{service}")
        case ("services", service, *_):
            return ("proto", "common", f"services.{service}")
    raise AssertionError(f"{file} is in no package of ours")


def wrong_imports(file: Path, tree: ast.AST) -> list[str]:
    ours = [
        name for name in imports(tree) if name.startswith(".") or name.split(".")[0] in PACKAGES
    ]
    return [
        name
        for name in ours
        if not any(f"{name}.".startswith(f"{root}.") for root in allowed(file))
    ]


@pytest.mark.parametrize("file", sources(), ids=str)
def test_imports_point_downwards(file: Path) -> None:
    assert wrong_imports(file, parse(file)) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("services/gateway/core.py", "from services.llm.engine import Engine"),
        ("services/gateway/core.py", "from services import llm"),
        ("services/gateway/core.py", "import services.llm"),
        ("services/gateway/core.py", "from services import cli"),
        ("services/gateway/core.py", "from ..llm import engine"),
        ("services/gateway/core.py", "def f():\n    from services.vision import cache"),
        ("services/launcher/launcher.py", "from services.gateway.core import GatewayCore"),
        ("services/cli.py", "import services.llm.__main__"),
        ("services/launcher/launcher.py", "import compute.device"),
        ("services/commands/generate.py", "from services.launcher import fleet"),
        ("services/preprocess/worker.py", "from compute.weights import Weights"),
        ("compute/weights.py", "from services.llm.engine import Engine"),
        ("common/links.py", "from compute.device import choose_device"),
        ("common/links.py", "from services.commands.generate import status"),
        ("common/links.py", "from . import wire"),
        ("proto/twinlens/x.py", "from common.wire import encode"),
        ("services/llm/engine.py", "import services.llm_other"),
    ],
)
def test_an_import_that_points_elsewhere_is_found(file: str, line: str) -> None:
    assert wrong_imports(Path(file), ast.parse(line)) != []


def test_what_is_looked_at_is_there() -> None:
    looked_at = {str(file) for file in sources()}
    assert {
        "common/wire.py",
        "services/cli.py",
        "services/llm/scheduler.py",
        "services/gateway/__main__.py",
    } <= looked_at
