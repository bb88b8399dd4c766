"""Whether this host has the memory that a reference needs."""

from pathlib import Path

from common.cgroup import ROOT, container_memory, words
from services.commands.client import ClientError

GIB = 1 << 30
MEMINFO = Path("/proc/meminfo")


def check_memory(needed: int) -> None:
    """Raise ClientError if fewer bytes than `needed` are available."""
    if needed > (found := available()):
        raise ClientError(
            f"the reference needs {needed / GIB:.1f} GiB of memory, {found / GIB:.1f} GiB are "
            "available here: run it on another host, with --url of this system"
        )


def available(meminfo: Path = MEMINFO, cgroup: Path = ROOT) -> int:
    """Return the bytes that this process could use, the cache of files included, which gives way.

    A system that serves the same model here has its files in that cache.
    """
    host = entry(meminfo, "MemAvailable:") * 1024
    cached = sum(entry(cgroup / "memory.stat", f"{kind}_file") for kind in ("active", "inactive"))
    return min([host, *(left + cached for left in container_memory(cgroup))])


def entry(file: Path, name: str) -> int:
    """Return the number behind a name in a file of names and numbers; 0 if it is not there."""
    found = words(file)
    return int(found[found.index(name) + 1]) if name in found[:-1] else 0
