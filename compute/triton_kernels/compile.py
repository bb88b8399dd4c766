"""Compile every kernel ahead of time, for cards that are not at hand.

    python -m compute.triton_kernels.compile [--arch 80 90 100] [--json FILE]

It prints a table of registers, spills and shared memory. It fails if a kernel spills registers, or
needs more shared memory than the card has.
"""

import argparse
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compute import triton_kernels
from compute.triton_kernels.variant import Variant

ARCHES = (80, 90, 100)
SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448}
"""The most shared memory of one program: NVIDIA's limit for each architecture."""
WARP_THREADS = 32
ALIGNMENT = 16
"""Triton compiles a kernel again for arguments that are multiples of this, as most are."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one program of a compiled kernel uses."""

    name: str
    arch: int
    num_warps: int
    registers: int
    """Of each thread."""
    spill_stores: int
    """Instructions that write to local memory."""
    spill_loads: int
    shared_bytes: int

    @property
    def objection(self) -> str:
        """Why the kernel should not stay as it is; "" if it may."""
        label = f"{self.name} on sm_{self.arch}"
        if self.spill_stores or self.spill_loads:
            return f"{label} spills registers: {self.spill_stores}/{self.spill_loads}"
        limit = SHARED_BYTES.get(self.arch)
        if limit is not None and self.shared_bytes > limit:
            return f"{label} needs {self.shared_bytes} bytes of shared memory, of {limit}"
        return ""

    def __str__(self) -> str:
        spills = f"{self.spill_stores}/{self.spill_loads}"
        return f"{self.registers} · {spills} · {self.shared_bytes / 1024:.1f}"


def all_variants() -> Iterator[Variant]:
    """Return the variants of every module of this package that lists some."""
    for found in pkgutil.iter_modules(triton_kernels.__path__):
        module = importlib.import_module(f"{triton_kernels.__name__}.{found.name}")
        if hasattr(module, "variants"):
            yield from module.variants()


def usage_of(variant: Variant, arch: int) -> Usage:
    """Compile a variant and return what it uses. No device is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs=variant.constexprs,
        attrs=alignments(variant),
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, WARP_THREADS),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    assembly = disassembled(compiled.asm["cubin"])
    return Usage(
        variant.name,
        arch,
        variant.num_warps,
        registers_of(compiled.asm["cubin"]),
        spill_stores=assembly.count(" STL"),
        spill_loads=assembly.count(" LDL"),
        shared_bytes=compiled.metadata.shared,
    )


def alignments(variant: Variant) -> dict[tuple[int], list[list[Any]]]:
    """Return the attributes of pointers and strides: they are multiples of ALIGNMENT.

    Strides that the kernel is not specialised for have none.
    """
    arguments = zip(variant.signature.items(), variant.kernel.params, strict=True)
    return {
        (index,): [["tt.divisibility", ALIGNMENT]]
        for index, ((name, kind), parameter) in enumerate(arguments)
        if kind.startswith("*")
        or (kind != "constexpr" and "stride" in name and not parameter.do_not_specialize)
    }


def disassembled(cubin: bytes) -> str:
    return run_tool("nvdisasm", cubin)


def registers_of(cubin: bytes) -> int:
    """Return the registers of a thread, from a line like "REG:40 STACK:0 SHARED:0"."""
    report = run_tool("cuobjdump", cubin, "-res-usage")
    return int(report.split("REG:")[1].split()[0])


def run_tool(name: str, cubin: bytes, *options: str) -> str:
    """Return what one of the tools that Triton brings prints about a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, *options, file.name], capture_output=True, check=True)
    return done.stdout.decode()


def table_of(usages: Iterable[Usage], arches: Sequence[int]) -> str:
    """Return a table in Markdown, with a row for each variant."""
    rows: dict[tuple[str, int], dict[int, Usage]] = {}
    for usage in usages:
        rows.setdefault((usage.name, usage.num_warps), {})[usage.arch] = usage
    heads = "".join(f" sm_{arch} |" for arch in arches)
    lines = [f"| kernel | warps |{heads}", "|---|---:|" + "---:|" * len(arches)]
    for (name, num_warps), found in rows.items():
        cells = "".join(f" {found.get(arch, '')} |" for arch in arches)
        lines.append(f"| {name} | {num_warps} |{cells}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if every kernel compiles and fits, else 1."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel ahead of time.")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHES, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a line for each kernel and arch")
    parser.add_argument("--only", default="", metavar="PART", help="kernels with this in the name")
    args = parser.parse_args(argv)
    if not triton_kernels.is_installed():
        parser.error("Triton is not installed: pip install 'twinlens[kernels]'")
    # Triton reads both when the kernels are imported.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    usages = [
        usage_of(variant, arch)
        for variant in all_variants()
        for arch in args.arch
        if args.only in variant.name and variant.min_arch <= arch <= variant.max_arch
    ]
    if args.json:
        lines = [f"{json.dumps(asdict(usage))}\n" for usage in usages]
        args.json.write_text("".join(lines), encoding="utf-8")
    print("Each cell: registers of a thread · spill stores/loads · shared memory in KiB\n")
    print(table_of(usages, args.arch))
    objections = [usage.objection for usage in usages if usage.objection]
    print(*objections, sep="\n", file=sys.stderr)
    return 1 if objections else 0


if __name__ == "__main__":
    sys.exit(main())
