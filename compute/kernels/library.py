"""Compiles and loads the kernels; where that fails there are none, and torch does their work.

`python -m compute.kernels.library` compiles them ahead, beside their sources, for every CPU that
can run them: for machines without a compiler.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_long, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.logs import get_logger

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
SIGNATURES: dict[str, list[type]] = {
    "linear": [c_void_p, c_void_p, c_long, c_void_p, c_void_p, c_long, c_int],
    "take_rows": [*[c_void_p] * 3, c_long, c_int],
    "rms_norm": [c_void_p, c_void_p, c_void_p, c_float, c_long, c_long, c_int],
    "silu_mul": [c_void_p, c_void_p, c_long, c_long, c_int],
    "rotate": [c_void_p, c_long, c_void_p, c_void_p, c_long, c_int, c_int, c_int],
    "attention": [
        c_void_p,
        c_long,
        c_void_p,
        c_void_p,
        c_long,
        c_void_p,
        c_void_p,
        c_long,
        c_long,
        c_long,
        *[c_int] * 5,
    ],
    "scatter": [c_void_p, c_long, c_void_p, c_void_p, c_long, c_long],
    "decode_attention": [c_void_p, c_void_p, c_long, c_void_p, c_void_p, c_long, c_int],
    "decode": [*[c_void_p] * 5, c_long, c_long, c_int],
}


@dataclass(frozen=True, slots=True)
class Sources:
    """One instruction set's kernels: what all have in common, and its own folder."""

    folder: Path
    needed_flags: frozenset[str]
    portable: tuple[str, ...]
    """The compiler's flags for whatever CPU has these."""
    signatures: dict[str, list[type]]

    def files(self, pattern: str) -> list[Path]:
        return [file for folder in (FOLDER, self.folder) for file in sorted(folder.glob(pattern))]


AVX512 = Sources(
    FOLDER / "avx512",
    frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16"}),
    ("-march=x86-64-v4", "-mavx512bf16"),
    SIGNATURES,
)
# oneDNN packs no bfloat16 for these CPUs, so the kernels do it themselves.
AVX2 = Sources(
    FOLDER / "avx2",
    frozenset({"avx2", "fma", "bmi1", "bmi2"}),
    ("-march=x86-64-v3",),
    SIGNATURES
    | {
        "pack_weights": [c_void_p, c_void_p, c_long, c_long],
        "pack_int8": [c_void_p, c_void_p, c_long, c_long],
    },
)


@cache
def bfloat16_kernels() -> ctypes.CDLL | None:
    """None where there are none for this CPU, or no compiler is at hand and none was before."""
    sources = sources_for(cpu_flags())
    return None if sources is None else load(sources)


@cache
def int8_kernels() -> ctypes.CDLL | None:
    """Those of the weights of eight bits, which are the same for every CPU with AVX2."""
    flags = cpu_flags()
    if sources_for(flags) is AVX2:
        return bfloat16_kernels()
    return load(AVX2) if AVX2.needed_flags <= flags else None


def load(sources: Sources) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(library_of(sources)))
    except (OSError, subprocess.SubprocessError) as e:
        get_logger().warning("the kernels cannot be loaded, torch does their work", reason=str(e))
        return None
    for name, arguments in sources.signatures.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = None
    return library


def sources_for(flags: frozenset[str]) -> Sources | None:
    """AVX-512 without bfloat16 has none of ours: oneDNN does well there."""
    if AVX512.needed_flags <= flags:
        return AVX512
    return AVX2 if AVX2.needed_flags <= flags and "avx512f" not in flags else None


@cache
def cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def library_of(sources: Sources) -> Path:
    """For this CPU, from the cache or made now (several processes may do so at once); without a
    compiler the one made ahead."""
    compiler = shutil.which("gcc")
    if compiler is None:
        return library_file(sources.folder, sources, sources.portable)
    path = library_file(cache_folder(), sources, (*NATIVE, *sorted(cpu_flags())))
    if not path.exists():
        compile_library(compiler, sources, NATIVE, path)
    return path


def library_file(folder: Path, sources: Sources, variant: tuple[str, ...]) -> Path:
    """Where the library of these sources lies: another source or variant has another name."""
    content = (
        b"".join(file.read_bytes() for file in sources.files("*.[ch]"))
        + " ".join((*FLAGS, *variant)).encode()
    )
    return folder / f"bfloat16-{hashlib.sha256(content).hexdigest()[:16]}.so"


def compile_library(compiler: str, sources: Sources, target: tuple[str, ...], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [
            compiler,
            *map(str, sources.files("*.c")),
            f"-I{FOLDER}",
            *target,
            *FLAGS,
            "-o",
            str(made),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS)
        made.replace(path)


def cache_folder() -> Path:
    """One that nobody else can write to, as what lies there is executed."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twinlens"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    for each in (AVX512, AVX2):
        compile_library("gcc", each, each.portable, library_file(each.folder, each, each.portable))
