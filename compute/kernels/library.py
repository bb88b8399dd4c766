"""Compile and load the C kernels of this CPU; without them, torch computes instead.

`python -m compute.kernels.library` compiles the kernels of every instruction set into the source
folders, for machines that have no compiler.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import c_float, c_int, c_long, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.logs import get_logger
from compute.kernels.structures import EntryStruct, expected_layout

FOLDER = Path(__file__).parent
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-lm",
)
NATIVE = ("-march=native",)
COMPILE_SECONDS = 60
PORTABLE = ContextVar("PORTABLE", default=False)
"""Whether this is inside of `portable`."""
SIGNATURES: dict[str, list[type]] = {
    "linear": [c_void_p, c_void_p, c_long, c_void_p, c_void_p, c_long, c_int],
    "pack_int8": [c_void_p, c_void_p, c_long, c_long],
    "pack_int4": [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_long],
    "take_rows": [c_void_p, c_void_p, c_void_p, c_long, c_int],
    "rms_norm": [c_void_p, c_void_p, c_void_p, c_float, c_long, c_long, c_int],
    "gelu_tanh": [c_void_p, c_void_p, c_long, c_long, c_int],
    "silu_mul": [c_void_p, c_void_p, c_long, c_long, c_int],
    "rotate": [c_void_p, c_long, c_void_p, c_void_p, c_long, c_int, c_int, c_int],
    "attention": [
        *(c_void_p, c_long),  # queries
        *(c_void_p, c_void_p, c_long),  # keys and values
        *(c_void_p, c_long, c_long),  # bias
        c_void_p,  # mask
        *(c_void_p, c_void_p),  # output and workspace
        *(c_long, c_long, c_long),  # number of sequences, their queries and their keys
        *(c_int, c_int, c_int),  # heads
        *(c_int, c_int),
    ],
    "scatter": [c_void_p, c_long, c_void_p, c_void_p, c_long, c_long],
    "decode_attention": [c_void_p, c_void_p, c_long, c_void_p, c_void_p, c_long, c_int],
    "decode": [
        c_void_p,
        c_void_p,
        c_void_p,
        c_void_p,
        c_void_p,
        c_long,
        c_long,
        c_int,
    ],
}


@dataclass(frozen=True, slots=True)
class Sources:
    """The kernels of one instruction set: the common sources and those of its own folder."""

    folder: Path
    needed_flags: frozenset[str]
    """The CPU flags without which the kernels cannot run."""

    portable: tuple[str, ...]
    """The compiler flags for every CPU that has `needed_flags`."""

    panel: int
    """The number of outputs in one panel of packed weights."""

    int4_panel: int
    """The same for int4 weights."""

    signatures: dict[str, list[type]]

    def files(self, pattern: str) -> list[Path]:
        return [file for folder in (FOLDER, self.folder) for file in sorted(folder.glob(pattern))]


AVX512 = Sources(
    folder=FOLDER / "avx512",
    needed_flags=frozenset(
        {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16"}
    ),
    portable=("-march=x86-64-v4", "-mavx512bf16"),
    panel=64,
    int4_panel=64,
    signatures=SIGNATURES,
)
# oneDNN does not pack bfloat16 weights for these CPUs, so the kernels pack them.
AVX2 = Sources(
    folder=FOLDER / "avx2",
    needed_flags=frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2"}),
    portable=("-march=x86-64-v3",),
    panel=16,
    int4_panel=32,
    signatures=SIGNATURES | {"pack_weights": [c_void_p, c_void_p, c_long, c_long]},
)


@contextmanager
def portable() -> Iterator[None]:
    """Compute with torch's own operations alone, as a model that is exported must.

    What is loaded here packs no weights, and nothing that runs here uses the C kernels.
    """
    token = PORTABLE.set(True)
    try:
        yield
    finally:
        PORTABLE.reset(token)


@cache
def bfloat16_kernels() -> ctypes.CDLL | None:
    """Return the bfloat16 kernels of this CPU.

    None if the CPU has none, or if they were not compiled before and there is no compiler.
    """
    sources = sources_for(cpu_flags())
    return None if sources is None else load(sources)


@cache
def int8_kernels() -> ctypes.CDLL | None:
    """Return the kernels for weights of eight or four bits: those for bfloat16, if there are any.

    A CPU that has AVX-512 without bfloat16 uses the AVX2 kernels for such weights. None if the CPU
    lacks AVX2, or if they were not compiled before and there is no compiler.
    """
    flags = cpu_flags()
    if sources_for(flags) is not None:
        return bfloat16_kernels()
    return load(AVX2) if AVX2.needed_flags <= flags else None


def panel_of(kernels: ctypes.CDLL, name: str = "PANEL") -> int:
    """Return the number of outputs in one panel of these kernels' packed weights.

    `name` is "PANEL", or "INT4_PANEL" for int4 weights.
    """
    return exported_layout(kernels)[name]


def load(sources: Sources) -> ctypes.CDLL | None:
    """Return the library of these sources, with the types of its functions' arguments set.

    None if it can neither be found nor compiled. Raises AssertionError if the Python mirror of its
    structures is wrong.
    """
    try:
        library = ctypes.CDLL(str(find_or_compile(sources)))
    except (OSError, subprocess.SubprocessError) as e:
        get_logger().warning(
            "the C kernels cannot be loaded; torch computes instead", reason=str(e)
        )
        return None
    check_layout(library, sources)
    for name, arguments in sources.signatures.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = None
    return library


def check_layout(library: ctypes.CDLL, sources: Sources) -> None:
    """Raise AssertionError, naming each difference, if C and structures.py do not agree."""
    compiled = exported_layout(library)
    expected = expected_layout() | {"PANEL": sources.panel, "INT4_PANEL": sources.int4_panel}
    differences = [
        f"{name} is {in_c} in C and {in_python} in Python"
        for name in sorted(compiled.keys() | expected.keys())
        if (in_c := compiled.get(name, "absent")) != (in_python := expected.get(name, "absent"))
    ]
    assert not differences, f"the C kernels and structures.py disagree: {'; '.join(differences)}"


def exported_layout(library: ctypes.CDLL) -> dict[str, int]:
    """Return the table of layout.c: sizes, offsets and constants by name."""
    num_entries = c_long.in_dll(library, "num_layout_entries").value
    entries = (EntryStruct * num_entries).in_dll(library, "layout")
    return {entry.name.decode(): entry.value for entry in entries}


def sources_for(flags: frozenset[str]) -> Sources | None:
    """Return the kernels for a CPU with these flags.

    None for AVX-512 without bfloat16 as well, because oneDNN is fast there.
    """
    if AVX512.needed_flags <= flags:
        return AVX512
    return AVX2 if AVX2.needed_flags <= flags and "avx512f" not in flags else None


@cache
def cpu_flags() -> frozenset[str]:
    """Return this CPU's flags as /proc/cpuinfo names them, or nothing if it cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def find_or_compile(sources: Sources) -> Path:
    """Return the path of the library for this CPU, compiled now if the cache does not have it.

    Several processes may call this at once. Without a compiler it is the path of the library that
    was compiled ahead, which may not exist.
    """
    compiler = shutil.which("gcc")
    if compiler is None:
        return library_path(sources.folder, sources, sources.portable)
    path = library_path(cache_folder(), sources, (*NATIVE, *sorted(cpu_flags())))
    if not path.exists():
        compile_library(compiler, sources, NATIVE, path)
    return path


def library_path(folder: Path, sources: Sources, variant: tuple[str, ...]) -> Path:
    """Return where the library lies in `folder`; other sources or flags have another name."""
    content = (
        b"".join(file.read_bytes() for file in sources.files("*.[ch]"))
        + " ".join((*FLAGS, *variant)).encode()
    )
    return folder / f"bfloat16-{hashlib.sha256(content).hexdigest()[:16]}.so"


def compile_library(compiler: str, sources: Sources, target: tuple[str, ...], path: Path) -> None:
    """Compile the sources for the CPUs that the `target` flags name, and move the result to `path`.

    Raises subprocess.SubprocessError if the compiler fails or takes too long.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [
            compiler,
            *map(str, sources.files("*.c")),
            f"-I{FOLDER}",
            f"-I{sources.folder}",
            *target,
            *FLAGS,
            "-o",
            str(made),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS)
        made.replace(path)


def cache_folder() -> Path:
    """Return the folder of compiled libraries; only its owner can write to it, as they are run."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twinlens"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    for each in (AVX512, AVX2):
        compile_library("gcc", each, each.portable, library_path(each.folder, each, each.portable))
