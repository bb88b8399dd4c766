"""Only vision and llm load torch: the others start in a moment and weigh little. The scheduler is
tested without it."""

import subprocess
import sys

import pytest

from tests.policy.sources import ROOT, sources

WITHOUT_TORCH = [
    *(
        f"services.{name}.__main__"
        for name in ("controller", "gateway", "preprocess", "detokenizer")
    ),
    "services.cli",
    "services.launcher.launcher",
    "services.commands.plan",
    *(f"services.llm.{name}" for name in ("scheduler", "block_pool", "request", "step_plan")),
    *sorted(str(file.with_suffix("")).replace("/", ".") for file in sources("common")),
]
PROGRAM = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
loaded = {name.partition(".")[0] for name in sys.modules}
print(*sorted({"torch", "transformers", "torchvision", "safetensors"} & loaded))
"""


def heavy_modules_after(module: str) -> str:
    command = [sys.executable, "-c", PROGRAM, module]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_it_loads_no_torch(module: str) -> None:
    assert heavy_modules_after(module) == ""


def test_one_that_does_would_be_seen() -> None:
    assert "torch" in heavy_modules_after("compute.torch_tensors")
