"""Which kernels a CPU gets, and from where."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from compute.kernels import library
from compute.kernels.library import (
    AVX2,
    AVX512,
    Sources,
    compile_library,
    library_file,
    library_of,
    sources_for,
)

ZEN_3 = frozenset({"avx", "avx2", "fma", "bmi1", "bmi2", "f16c"})
ICE_LAKE = ZEN_3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"}


@pytest.mark.parametrize(
    ("flags", "sources"),
    [
        (ZEN_3, AVX2),
        (ICE_LAKE | {"avx512_bf16"}, AVX512),
        (ICE_LAKE, None),
        (ZEN_3 - {"fma"}, None),
        (frozenset[str](), None),
    ],
)
def test_a_cpu_gets_what_it_can_run(flags: frozenset[str], sources: Sources | None) -> None:
    assert sources_for(flags) is sources


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler")
@pytest.mark.parametrize("sources", [AVX2, AVX512], ids=["avx2", "avx512"])
def test_a_library_made_ahead_serves_where_no_compiler_is(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in sources.folder.glob("*.[ch]"):
        shutil.copy(file, tmp_path)
    copied = replace(sources, folder=tmp_path)
    made = library_file(tmp_path, copied, copied.portable)
    compile_library("gcc", copied, copied.portable, made)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert library_of(copied) == made and made.exists()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler")
def test_with_a_compiler_the_library_is_for_this_very_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if (sources := sources_for(library.cpu_flags())) is None:
        pytest.skip("no kernels for this CPU")
    assert library_of(sources).is_relative_to(tmp_path)
