"""Compiles and loads the kernels; where that fails there are none, and torch does their work."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_long, c_void_p
from functools import cache
from pathlib import Path

from common.logs import get_logger

FOLDER = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC", "-lm")
COMPILE_SECONDS = 60
SIGNATURES: dict[str, list[type]] = {
    "linear": [c_void_p, c_long, c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, c_int],
    "rms_norm": [c_void_p, c_void_p, c_void_p, c_float, c_long, c_long, c_int],
    "silu_mul": [c_void_p, c_void_p, c_long, c_long, c_int],
    "rotate": [c_void_p, c_long, c_void_p, c_void_p, c_long, c_int, c_int, c_int],
    "attention": [c_void_p, c_long, c_void_p, c_void_p, c_long, c_void_p, c_void_p, c_long, c_long, c_long, *[c_int] * 5],
    "scatter": [c_void_p, c_long, c_void_p, c_void_p, c_long, c_long],
    "decode_attention": [c_void_p, c_long, c_void_p, c_void_p, c_void_p, c_long, c_void_p, c_void_p, *[c_int] * 6],
}


@cache
def bfloat16_kernels() -> ctypes.CDLL | None:
    """None where the CPU has no bfloat16 dot product, or no compiler is at hand."""
    compiler = shutil.which("gcc")
    if "avx512_bf16" not in cpu_flags() or compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as e:
        get_logger().warning("the kernels cannot be compiled, torch does their work", reason=str(e))
        return None
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


@cache
def cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def compiled(compiler: str) -> Path:
    """The library for this source and this CPU, from the cache or made now: several processes may do so at once."""
    sources = sorted(FOLDER.glob("*.[ch]"))
    content = b"".join(file.read_bytes() for file in sources) + " ".join((*FLAGS, *sorted(cpu_flags()))).encode()
    path = cache_folder() / f"bfloat16-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            units = [str(file) for file in sources if file.suffix == ".c"]
            subprocess.run([compiler, *units, *FLAGS, "-o", str(made)], check=True, capture_output=True, timeout=COMPILE_SECONDS)
            made.replace(path)
    return path


def cache_folder() -> Path:
    """One that nobody else can write to, as what lies there is executed."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twinlens"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
