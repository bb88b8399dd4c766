"""Only vision and llm load torch: the other services start quickly and need little memory.

The scheduler is tested without torch.
"""

import json
import subprocess
import sys

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
import importlib, json, sys
HEAVY = {"torch", "transformers", "torchvision", "safetensors"}
found = {}
for name in sys.argv[1:]:
    before = set(sys.modules)
    importlib.import_module(name)
    loaded = {module.partition(".")[0] for module in set(sys.modules) - before}
    if HEAVY & loaded:
        found[name] = sorted(HEAVY & loaded)
print(json.dumps(found))
"""


def heavy_packages(modules: list[str]) -> dict[str, list[str]]:
    """Import the modules one after another; return the heavy packages that each loads first."""
    command = [sys.executable, "-c", PROGRAM, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def test_these_modules_load_no_torch() -> None:
    assert heavy_packages(WITHOUT_TORCH) == {}


def test_a_module_that_loads_torch_would_be_found() -> None:
    assert (
        "torch" in heavy_packages(["common.wire", "compute.torch_tensors"])["compute.torch_tensors"]
    )
