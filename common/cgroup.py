"""What a container may use of its host's cores: the limit of its control group, version 2 or 1."""

from math import ceil
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def core_limit(root: Path = ROOT) -> int | None:
    """Cores' worth of time, rounded up; None without a limit."""
    found = words(root / "cpu.max") or words(root / "cpu/cpu.cfs_quota_us") + words(root / "cpu/cpu.cfs_period_us")
    if len(found) != 2 or found[0] in ("max", "-1"):
        return None
    return ceil(int(found[0]) / int(found[1]))


def words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
