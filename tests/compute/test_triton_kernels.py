"""Whether the kernels in Triton can run, from what the host has."""

from pathlib import Path

import pytest
import torch

from compute import triton_kernels

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A host with Triton, a compiler and Python's headers."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(triton_kernels, "is_installed", lambda: True)
    monkeypatch.setattr(triton_kernels, "headers", lambda: tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(triton_kernels, "objection", triton_kernels.objection.__wrapped__)
    return monkeypatch


def test_a_card_is_served_if_nothing_is_missing(host: pytest.MonkeyPatch) -> None:
    assert triton_kernels.objection() == ""
    assert triton_kernels.serve(CUDA) and not triton_kernels.serve(CPU)


def test_a_compiler_is_needed_but_not_by_the_interpreter(host: pytest.MonkeyPatch) -> None:
    """Triton would raise at the first launch, in the middle of a model."""
    host.setattr("shutil.which", lambda name: None)
    assert "no C compiler" in triton_kernels.objection()
    assert not triton_kernels.serve(CUDA)
    with triton_kernels.interpreted():
        assert triton_kernels.serve(CPU)
    host.setenv("CC", "/opt/bin/cc")
    assert triton_kernels.objection() == ""


def test_pythons_headers_are_needed(host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").unlink()
    assert f"no Python.h in {tmp_path}" in triton_kernels.objection()
    assert not triton_kernels.serve(CUDA)


def test_triton_itself_is_needed(host: pytest.MonkeyPatch) -> None:
    host.setattr(triton_kernels, "is_installed", lambda: False)
    assert "not installed" in triton_kernels.objection()
    with triton_kernels.interpreted():
        assert not triton_kernels.serve(CPU)


def test_headers_are_sought_where_they_are() -> None:
    assert triton_kernels.headers().name.startswith("python3")
