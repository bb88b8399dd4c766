"""How the servers are started that `benchmarks.compare` puts next to Twinlens.

Each comes from a virtual environment of its own that the user has made. The versions that were
tried, and how they were installed, are in docs/benchmarks.md.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_SEQUENCES = 16
CONTEXT_TOKENS = 4096
LLAMA_SLOTS = 4
KV_GIB = 2
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a server finds its programs and its model, and where it must listen."""

    folder: Path
    """The virtual environment, or the folder with the program."""
    model: str
    port: int
    threads: int

    def program(self, name: str) -> str:
        """Return the path of a program: in the folder itself, or in its `bin`."""
        own = self.folder / name
        return str(own if own.exists() else self.folder / "bin" / name)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A server with an OpenAI endpoint."""

    name: str
    command: Callable[[Place], list[str]]
    environment: Callable[[Place], Mapping[str, str]] = field(default=lambda place: {})
    ready_path: str = "/v1/models"
    """Answers with 200 once the server can answer requests."""

    def variables(self, place: Place) -> dict[str, str]:
        """Return the whole environment of the server's process."""
        threads = str(place.threads)
        return {
            **os.environ,
            **OFFLINE,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            **self.environment(place),
        }


def twinlens(place: Place) -> list[str]:
    return [
        *(sys.executable, "-m", "services.cli", "serve"),
        *("--model", place.model),
        *("--dtype", "bfloat16"),
        *("--http-port", str(place.port)),
        *("--grpc-port", str(place.port + 1)),
    ]


def vllm(place: Place) -> list[str]:
    return [
        *(place.program("vllm"), "serve", place.model),
        *("--host", "127.0.0.1", "--port", str(place.port)),
        *("--dtype", "bfloat16"),
        *("--max-model-len", str(CONTEXT_TOKENS), "--max-num-seqs", str(MAX_SEQUENCES)),
        *("--limit-mm-per-prompt", '{"image": 1, "video": 0}'),
        # It would encode the largest image at its start, which takes minutes on a CPU.
        "--skip-mm-profiling",
    ]


def vllm_environment(place: Place) -> dict[str, str]:
    """Return what vLLM's documentation for CPUs recommends."""
    cores = f"0-{place.threads - 1}"
    libraries = [
        Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"),
        place.folder / "lib" / "libiomp5.so",
    ]
    found = ":".join(str(library) for library in libraries if library.exists())
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "LD_PRELOAD": found,
    }


def openvino(place: Place) -> list[str]:
    server = ROOT / "benchmarks" / "openvino_server.py"
    return [
        *(place.program("python"), str(server), place.model),
        *("--port", str(place.port), "--threads", str(place.threads)),
    ]


def llama_cpp(place: Place) -> list[str]:
    model = Path(place.model)
    return [
        *(place.program("llama-server"), "--model", str(model / "model.gguf")),
        *("--mmproj", str(model / "mmproj.gguf")),
        *("--host", "127.0.0.1", "--port", str(place.port)),
        *("--threads", str(place.threads), "--threads-batch", str(place.threads)),
        *("--parallel", str(LLAMA_SLOTS), "--ctx-size", str(LLAMA_SLOTS * CONTEXT_TOKENS)),
    ]


def transformers(place: Place) -> list[str]:
    return [
        *(place.program("transformers"), "serve", place.model),
        *("--host", "127.0.0.1", "--port", str(place.port)),
        *("--device", "cpu", "--dtype", "bfloat16"),
    ]


TWINLENS = Peer(
    name="twinlens",
    command=twinlens,
    environment=lambda place: {"PYTHONPATH": str(ROOT)},
    ready_path="/readyz",
)
PEERS = {
    peer.name: peer
    for peer in (
        Peer(name="vllm", command=vllm, environment=vllm_environment),
        Peer(name="openvino", command=openvino),
        Peer(name="llama.cpp", command=llama_cpp),
        Peer(name="transformers", command=transformers),
    )
}
