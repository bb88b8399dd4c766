"""Kernels compile ahead of time, and one that spills or does not fit is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from compute.triton_kernels import compile as ahead
from compute.triton_kernels.compile import Usage, all_variants, table_of

ASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
KERNEL = "silu and product fp32"


@pytest.mark.skipif(not ASSEMBLER.exists(), reason="this Triton brings no assembler for NVIDIA")
def test_a_kernel_compiles_without_a_device(tmp_path: Path) -> None:
    """In a process of its own: here the interpreter has replaced the compiler."""
    report = tmp_path / "usages.jsonl"
    command = [sys.executable, "-m", ahead.__name__, "--arch", "80", "90"]
    command += ["--only", KERNEL, "--json", report]
    environ = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    usages = [Usage(**json.loads(line)) for line in report.read_text().splitlines()]
    assert [(usage.name, usage.arch) for usage in usages] == [(KERNEL, 80), (KERNEL, 90)]
    assert all(0 < usage.registers < 256 for usage in usages)
    assert f"| {KERNEL} | 4 | {usages[0]} | {usages[1]} |" in done.stdout


@pytest.mark.parametrize(
    ("spill_stores", "spill_loads", "shared_bytes", "objection"),
    [
        (0, 0, 166912, ""),
        (0, 1, 0, "norm on sm_80 spills registers: 0/1"),
        (2, 0, 0, "norm on sm_80 spills registers: 2/0"),
        (0, 0, 166913, "norm on sm_80 needs 166913 bytes of shared memory, of 166912"),
    ],
)
def test_what_spills_or_does_not_fit_is_said(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spill_stores: int,
    spill_loads: int,
    shared_bytes: int,
    objection: str,
) -> None:
    usage = Usage("norm", 80, 4, 40, spill_stores, spill_loads, shared_bytes)
    monkeypatch.setattr(ahead, "usage_of", lambda variant, arch: usage)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    assert ahead.main(["--arch", "80", "--only", KERNEL]) == bool(objection)
    assert capsys.readouterr().err.strip() == objection


def test_an_architecture_without_the_instructions_has_an_empty_cell() -> None:
    usages = [Usage("a", 90, 4, 40, 0, 0, 1024), Usage("b", 80, 8, 41, 0, 0, 0)]
    assert table_of(usages, [80, 90]).splitlines()[2:] == [
        "| a | 4 |  | 40 · 0/0 · 1.0 |",
        "| b | 8 | 41 · 0/0 · 0.0 |  |",
    ]


def test_variants_describe_their_kernels() -> None:
    variants = list(all_variants())
    names = [variant.name for variant in variants]
    assert len(set(names)) == len(names)
    for variant in variants:
        arguments = list(variant.kernel.arg_names)
        assert list(variant.signature) == arguments, variant.name
        constants = [name for name, kind in variant.signature.items() if kind == "constexpr"]
        assert set(constants) == set(variant.constexprs), variant.name
