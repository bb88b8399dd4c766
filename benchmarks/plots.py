"""Draw docs/images/bench.png: the embedded model under rising concurrency.

    python -m benchmarks.plots

Starts `twinlens serve`, runs `twinlens bench` against it, and keeps the plot.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.serving import ROOT, Serving, own_environment

PLOT = ROOT / "docs" / "images" / "bench.png"
LOAD = "--concurrency 1,2,4,8,16 --image 224x224 --max-tokens 64 --requests 80 --seed 1"


def main() -> None:
    with Serving("--log-level", "warning") as system, tempfile.TemporaryDirectory() as folder:
        url = f"http://127.0.0.1:{system.http_port}/v1"
        command = [sys.executable, "-m", "services.cli", "bench", "--url", url, "--out", folder]
        subprocess.run([*command, *LOAD.split()], cwd=ROOT, env=own_environment(), check=True)
        PLOT.parent.mkdir(exist_ok=True)
        shutil.copy(Path(folder) / "bench.png", PLOT)
    print(f"wrote {PLOT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
