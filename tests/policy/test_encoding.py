"""Text files are UTF-8 whatever the locale of the machine is: each call says so."""

import ast
from pathlib import Path

import pytest

from tests.policy.sources import parse, sources

TEXT_METHODS = {"read_text", "write_text"}


def unencoded(tree: ast.AST) -> list[int]:
    """Return the lines that open a file as text without naming its encoding."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and opens_text(node)
        and not any(keyword.arg == "encoding" for keyword in node.keywords)
    ]


def opens_text(call: ast.Call) -> bool:
    match call.func:
        case ast.Attribute(attr=name) if name in TEXT_METHODS:
            return True
        case ast.Name(id="open"):
            modes = [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "mode")]
        case ast.Attribute(attr="open", value=ast.Name(id=module)) if module in ("os", "Image"):
            return False
        case ast.Attribute(attr="open"):
            modes = [*call.args[:1], *(k.value for k in call.keywords if k.arg == "mode")]
        case _:
            return False
    return not any(isinstance(m, ast.Constant) and "b" in str(m.value) for m in modes)


@pytest.mark.parametrize("file", sources(), ids=str)
def test_no_file_is_read_in_the_encoding_of_the_locale(file: Path) -> None:
    assert unencoded(parse(file)) == []


def test_the_rule_sees_each_way_to_open_a_file() -> None:
    texts = ["open(f)", "open(f, 'w')", "p.read_text()", "p.write_text(t)", "p.open('r')"]
    others = ["open(f, 'rb')", "p.open(mode='wb')", "open(f, encoding='utf-8')", "os.open(f, 0)"]
    assert [t for t in texts if not unencoded(ast.parse(t))] == []
    assert [t for t in others if unencoded(ast.parse(t))] == []
