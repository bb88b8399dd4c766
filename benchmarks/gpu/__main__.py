"""Measure Twinlens on a card, part by part: `scripts/gpu`. docs/gpu.md says how to read it."""

import argparse
import os
import platform
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import pack
from benchmarks.gpu.processes import adopt_orphans
from benchmarks.gpu.runner import INTERRUPTED, OK, SKIPPED, Files, Part, run

WEIGHTS = {
    "kernels": 3.5,
    "golden": 1.5,
    "speed": 2.5,
    "serve": 3.0,
    "sharing": 2.0,
    "profile": 1.0,
}
"""The parts in their order, each with its share of the time."""
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
NO_CARD = """torch {version} sees no CUDA device here: nothing was measured.
  scripts/gpu --dry-run  runs every part on the CPU at toy size
  scripts/gpu --pack     downloads what a machine with a card and without PyPI may lack"""


def main() -> int:
    options = parse()
    if options.pack:
        return pack.main()
    if not options.dry_run and not torch.cuda.is_available():
        print(NO_CARD.format(version=torch.__version__), file=sys.stderr)
        return EXIT_USAGE
    adopt_orphans()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command = [sys.executable, "-m", "benchmarks.gpu.part", "--folder", str(options.checkpoints)]
    if options.dry_run:
        command.append("--dry-run")
        # Other work on the same cores makes several threads wait for each other.
        os.environ["OMP_NUM_THREADS"] = "1"
    parts = [Part(name, WEIGHTS[name], command) for name in WEIGHTS if name in options.parts]
    files = Files(options.out)
    results = run(parts, 60 * options.minutes, files, machine(), options.dry_run)
    print(f"\n{files.table.read_text()}\nwritten to {options.out}", flush=True)
    if results[-1].status == INTERRUPTED:
        return EXIT_INTERRUPTED
    return 0 if all(result.status in (OK, SKIPPED) for result in results) else EXIT_FAILED


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=12.0, help="for all parts together (default: 12)"
    )
    parser.add_argument(
        "--parts",
        type=names,
        default=list(WEIGHTS),
        metavar="NAME,NAME",
        help=f"run only these of {', '.join(WEIGHTS)}",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT", ".gpu/results")),
        metavar="FOLDER",
        help="for the results (default: the variable OUT, or else .gpu/results)",
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=Path(".gpu/checkpoints"),
        metavar="FOLDER",
        help="for checkpoints with random weights, which take 8 GB (default: .gpu/checkpoints)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="run every part on the CPU, with stand-ins"
    )
    parser.add_argument(
        "--pack", action="store_true", help="download what a machine without PyPI may lack"
    )
    return parser.parse_args()


def names(text: str) -> list[str]:
    """Return names of parts; an argparse type."""
    found = text.split(",")
    if unknown := set(found) - set(WEIGHTS):
        raise argparse.ArgumentTypeError(
            f"no part {', '.join(sorted(unknown))}; there are {', '.join(WEIGHTS)}"
        )
    return found


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    found = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "device": "CPU"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["memory"] = f"{properties.total_memory / 1e9:.0f} GB"
        found["CUDA"] = str(torch.version.cuda)
    return found | {
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "Python": platform.python_version(),
        "cores": str(os.cpu_count()),
    }


def version_of(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    sys.exit(main())
