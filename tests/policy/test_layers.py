"""Imports point proto <- common <- one service. Services never import each other; the launcher and the client import no service."""

import ast
from pathlib import Path

import pytest

from tests.policy.sources import PACKAGES, imports, parse, sources

COMMANDS = tuple(
    f"services.{name}"
    for name in (
        "autoscale",
        "child",
        "cli",
        "client",
        "control_client",
        "fleet",
        "launcher",
        "plan",
        "sample",
        "serve_checks",
        "stage_times",
    )
)


def allowed(file: Path) -> tuple[str, ...]:
    """What of ours the file may import."""
    package, *inner = file.with_suffix("").parts
    if package == "proto":
        return ("proto",)
    if package == "common":
        return ("proto", "common")
    return ("proto", "common", *(COMMANDS if len(inner) == 1 else [f"services.{inner[0]}"]))


def wrong_imports(file: Path, tree: ast.AST) -> list[str]:
    ours = [name for name in imports(tree) if name.startswith(".") or name.split(".")[0] in PACKAGES]
    return [name for name in ours if not any(f"{name}.".startswith(f"{root}.") for root in allowed(file))]


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
        ("services/launcher.py", "from services.gateway.core import GatewayCore"),
        ("services/cli.py", "import services.llm.__main__"),
        ("common/links.py", "from services.client import status"),
        ("common/links.py", "from . import wire"),
        ("proto/twinlens/x.py", "from common.wire import encode"),
        ("services/llm/engine.py", "import services.llm_other"),
    ],
)
def test_an_import_that_points_elsewhere_is_found(file: str, line: str) -> None:
    assert wrong_imports(Path(file), ast.parse(line)) != []


def test_what_is_looked_at_is_there() -> None:
    looked_at = {str(file) for file in sources()}
    assert {"common/wire.py", "services/cli.py", "services/llm/scheduler.py", "services/gateway/__main__.py"} <= looked_at
