"""What a running system holds while it has no requests, to find leaks by comparing two moments."""

import os
import re
import urllib.request
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from proto.twinlens.control.v1 import control_pb2
from services.preprocess.sandbox.jobs import MAX_SPARES

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
MORE_DESCRIPTORS = 8 + 2 * MAX_SPARES
MORE_THREADS = 3
MORE_BYTES = 256 * 2**20
"""How much more a process may have than the largest of its role had before.

Caches of kernels fill, and freed memory is kept for reuse: in preprocess, MAX_SPARES pieces with
two descriptors each. Ten thousand requests may thus cost at most 30 kB each.
"""


@dataclass(frozen=True)
class Process:
    role: str
    descriptors: int
    threads: int
    resident: int


@dataclass(frozen=True)
class AtRest:
    processes: dict[int, Process]
    """The launcher and the members, by process id."""
    held: int
    """Requests and images that members have in hand or queued."""
    requests_in_flight: int
    """The gateway's metric of that name."""


def look(launcher: int, members: list[control_pb2.Member], metrics: str) -> AtRest:
    found = {m.pid: m.role for m in members} | {launcher: "launcher"}
    processes = {pid: process for pid, role in found.items() if (process := process_of(pid, role))}
    in_flight = round(sum(metric(metrics, "twinlens_gateway_requests_in_flight").values()))
    return AtRest(processes, sum(m.in_flight + m.queued for m in members), in_flight)


def process_of(pid: int, role: str, proc: Path = Path("/proc")) -> Process | None:
    with suppress(OSError):
        threads = re.search(r"^Threads:\s*(\d+)", (proc / str(pid) / "status").read_text(), re.M)
        resident = int((proc / str(pid) / "statm").read_text().split()[1]) * PAGE_BYTES
        assert threads
        return Process(role, len(os.listdir(proc / str(pid) / "fd")), int(threads[1]), resident)
    return None


def leaks(before: AtRest, after: AtRest, children: set[int]) -> list[str]:
    """Return a line for each thing that is held afterwards and should not be.

    `children` are the process ids of the launcher's children, as the kernel lists them.
    """
    found = [f"{after.held} requests or images are held"] * bool(after.held)
    found += [f"the gateway has {after.requests_in_flight} requests in flight"] * bool(
        after.requests_in_flight
    )
    members = {pid for pid, process in after.processes.items() if process.role != "launcher"}
    found += [f"process {pid} is not a member" for pid in sorted(children - members)]
    counts = {
        role: (len(old), len(by_role(after).get(role, ()))) for role, old in by_role(before).items()
    }
    found += [
        f"{now} processes of {role}, {then} before"
        for role, (then, now) in counts.items()
        if now != then
    ]
    return found + [
        excess
        for process in after.processes.values()
        for excess in excesses(process, by_role(before)[process.role])
    ]


def by_role(state: AtRest) -> dict[str, list[Process]]:
    found: defaultdict[str, list[Process]] = defaultdict(list)
    for process in state.processes.values():
        found[process.role].append(process)
    return found


def excesses(process: Process, before: list[Process]) -> list[str]:
    limits = {"descriptors": MORE_DESCRIPTORS, "threads": MORE_THREADS, "resident": MORE_BYTES}
    found = []
    for name, more in limits.items():
        now = getattr(process, name)
        then = max(getattr(old, name) for old in before)
        if now > then + more:
            found.append(f"{process.role}: {name} {now}, at most {then} before")
    return found


def metric(metrics: str, name: str) -> dict[str, float]:
    """Return the values of one metric by the text of their labels."""
    return {
        labels: float(value)
        for labels, value in re.findall(rf"^{name}(\{{[^}}]*\}})? ([0-9.e+-]+)$", metrics, re.M)
    }


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as response:
        return response.read().decode()
