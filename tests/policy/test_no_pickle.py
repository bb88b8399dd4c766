"""Nothing that comes from outside can become code: no pickle in any form, no eval, no exec."""

import ast
from pathlib import Path

import pytest

from tests.policy.sources import imports, parse, sources

MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "msgpack_numpy",
    "jsonpickle",
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {"send_pyobj", "recv_pyobj", "send_serialized", "recv_serialized"}


def dangers(tree: ast.AST) -> list[str]:
    found = [name for name in imports(tree) if name.split(".")[0] in MODULES]
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in BUILTINS:
                found.append(name)
            case ast.Attribute(attr=name) if name in METHODS:
                found.append(name)
            case ast.Call(
                func=ast.Attribute(attr="load", value=ast.Name(id="torch")), keywords=keywords
            ):
                if not any(
                    k.arg == "weights_only"
                    and isinstance(k.value, ast.Constant)
                    and k.value.value is True
                    for k in keywords
                ):
                    found.append("torch.load")
            case ast.keyword(arg="allow_pickle", value=value) if not (
                isinstance(value, ast.Constant) and value.value is False
            ):
                found.append("allow_pickle")
    return found


@pytest.mark.parametrize("file", sources(), ids=str)
def test_nothing_is_unpickled_or_evaluated(file: Path) -> None:
    assert dangers(parse(file)) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import msgpack_numpy as m",
        "def f():\n    import dill",
        "eval('1')",
        "exec(code)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "socket.recv_pyobj()",
    ],
)
def test_each_danger_is_found(line: str) -> None:
    assert len(dangers(ast.parse(line))) == 1


@pytest.mark.parametrize(
    "line",
    ["model.eval()", "re.compile('x')", "torch.load(path, weights_only=True)", "json.load(file)"],
)
def test_what_only_looks_like_one_is_none(line: str) -> None:
    assert dangers(ast.parse(line)) == []
