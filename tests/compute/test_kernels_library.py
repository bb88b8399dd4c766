"""Which kernels a CPU gets, where they come from, and whether Python knows their structures."""

import shutil
from ctypes import c_long
from dataclasses import replace
from pathlib import Path

import pytest

from compute.kernels import library, structures
from compute.kernels.library import (
    AVX2,
    AVX512,
    Sources,
    compile_library,
    cpu_flags,
    find_or_compile,
    library_path,
    load,
    sources_for,
)

ZEN_3 = frozenset({"avx", "avx2", "fma", "bmi1", "bmi2", "f16c"})
ICE_LAKE = ZEN_3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"}
needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler")


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


@needs_compiler
@pytest.mark.parametrize("sources", [AVX2, AVX512], ids=["avx2", "avx512"])
def test_a_library_compiled_ahead_is_used_without_a_compiler(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in sources.folder.glob("*.[ch]"):
        shutil.copy(file, tmp_path)
    copied = replace(sources, folder=tmp_path)
    made = library_path(tmp_path, copied, copied.portable)
    compile_library("gcc", copied, copied.portable, made)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert find_or_compile(copied) == made and made.exists()


@needs_compiler
def test_with_a_compiler_the_library_is_for_this_very_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if (sources := sources_for(cpu_flags())) is None:
        pytest.skip("no kernels for this CPU")
    assert find_or_compile(sources).is_relative_to(tmp_path)


@pytest.fixture(params=[AVX2, AVX512], ids=["avx2", "avx512"])
def loadable(request: pytest.FixtureRequest) -> Sources:
    """The sources of each instruction set whose library loads on this machine."""
    sources: Sources = request.param
    if not sources.needed_flags <= cpu_flags() or load(sources) is None:
        pytest.skip("the CPU lacks these instructions, or there is no compiler")
    return sources


def test_a_structure_with_a_field_more_than_in_c_is_refused(
    loadable: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PagedStruct(structures.PagedStruct):
        _fields_ = [("window", c_long)]

    monkeypatch.setattr(structures, "PagedStruct", PagedStruct)
    with pytest.raises(AssertionError, match="sizeof Paged is 56 in C and 64 in Python"):
        load(loadable)


def test_structures_with_fields_in_another_order_than_in_c_are_refused(
    loadable: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = structures.StepStruct._fields_

    class StepStruct(structures.Structure):
        _fields_ = [fields[1], fields[0], *fields[2:]]

    monkeypatch.setattr(structures, "StepStruct", StepStruct)
    with pytest.raises(
        AssertionError, match=r"Step\.cos is 0 in C and 8 in .*Step\.signed_sin is 8"
    ):
        load(loadable)


@pytest.mark.parametrize(
    "constant",
    [
        "CONTEXT_PADDING",
        "MAX_GROUP",
        "MAX_HEAD_DIM",
        "MAX_LINEAR_ROWS",
        "MAX_PIECE_INPUTS",
        "OCTET",
        "PART_TOKENS",
    ],
)
def test_a_constant_with_another_value_than_in_c_is_refused(
    constant: str, loadable: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structures, constant, 48)
    with pytest.raises(AssertionError, match=rf"{constant} is \d+ in C and 48 in Python"):
        load(loadable)


def test_a_panel_with_another_size_than_in_c_is_refused(loadable: Sources) -> None:
    with pytest.raises(AssertionError, match=r" PANEL is \d+ in C and 48 in Python"):
        load(replace(loadable, panel=48))
    with pytest.raises(AssertionError, match=r"INT4_PANEL is \d+ in C and 48 in Python"):
        load(replace(loadable, int4_panel=48))


def test_a_field_that_only_c_has_is_refused(
    loadable: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = structures.expected_layout()
    del expected["offset of Decoder.eps"]
    monkeypatch.setattr(library, "expected_layout", lambda: expected)
    with pytest.raises(AssertionError, match=r"Decoder\.eps is 120 in C and absent in Python"):
        load(loadable)
