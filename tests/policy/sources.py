"""The product's own Python files, and what they import."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("proto", "common", "compute", "services")


def is_generated(file: Path) -> bool:
    return "_pb2" in file.name


def sources(*packages: str) -> list[Path]:
    """All files that people write, relative to the root."""
    files = [
        file
        for package in packages or PACKAGES
        for file in (ROOT / package).rglob("*.py")
        if not is_generated(file)
    ]
    return sorted(file.relative_to(ROOT) for file in files)


def parse(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text(), str(file))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported anywhere in the file; a name taken from a module counts
    as one of the module's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names
            )
