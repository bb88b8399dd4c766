"""One soak: a system answers the questions undisturbed, another one while it has faults.

At the end the second system is examined for what is left over.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.soak import at_rest
from tests.soak.clients import Client
from tests.soak.faults import Faults
from tests.soak.reference import Reference, undisturbed
from tests.soak.verdicts import Tally
from tests.soak.whole_context import blocks_missing
from tests.soak.workload import Call, Question, make_calls
from tests.system.running import Running, processes_of

CONTEXT_TOKENS = 4096
KV_BYTES = 22 * 2**20
"""A KV cache for hardly more than one whole context of the embedded model: a few lost blocks are
noticed."""
REPLICAS = {"vision": 3, "llm": 2, "preprocess": 2, "detokenizer": 2}
ALWAYS = (
    "--dtype",
    "float32",
    "--embedding-cache-mib",
    "1",
    "--kv-memory",
    str(KV_BYTES),
    "--log-level",
    "info",
)
"""Caches are small. Pictures that come again are in them or no longer in them, requests are
preempted, and whatever grows with use is soon full."""
WARM_UP_SHARE = 0.05
WARM_UP_LEAST = 100
REST_SECONDS = 60.0
LOOK_SECONDS = 0.5
KILLED = -9
PROGRESS_CALLS = 500


@dataclass
class Report:
    options: dict[str, Any]
    tally: Tally = field(default_factory=Tally)
    accepted: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    leaks: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        return self.tally.is_clean and not self.leaks and not self.crashes

    def as_dict(self) -> dict[str, Any]:
        tally = self.tally
        seconds = sorted(self.tally.seconds) or [0.0]
        names = (
            "calls",
            "answered",
            "refused",
            "late",
            "cancelled",
            "lost",
            "duplicates",
            "differing",
            "near_ties",
        )
        counts = {name: getattr(tally, name) for name in names}
        causes = {
            "failed": dict(tally.failed),
            "unwelcome": dict(tally.unwelcome),
            "faults": dict(self.faults),
        }
        times = {
            "seconds": round(self.seconds, 1),
            "median": pick(seconds, 0.5),
            "p99": pick(seconds, 0.99),
            "longest": pick(seconds, 1),
        }
        ends = {"leaks": self.leaks, "crashes": self.crashes, "clean": self.is_clean}
        return self.options | {"accepted": self.accepted} | counts | causes | times | ends

    def table(self) -> str:
        rows = [f"{name:12} {value}" for name, value in self.as_dict().items()]
        return "\n".join([*rows, *(f"  {example}" for example in self.tally.examples)])


class Soak:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._calls = make_calls(
            options.seed,
            options.requests,
            options.questions or max(1, options.requests // 5),
            options.poison_every,
            options.poisons,
        )
        self.report = Report(
            {"requests": options.requests, "seed": options.seed, "clients": options.clients}
        )

    async def run(self) -> Report:
        references = await self._references()
        began = time.monotonic()
        with self._running(self._options.vision_ms, **REPLICAS) as system:
            await self._disturb(system, references)
            self.report.crashes = crashes_of(system)
            if self._options.log:
                self._options.log.write_text("".join(system.lines))
            children = processes_of(system.process.pid)
        if left := {pid for pid in children if Path(f"/proc/{pid}").exists()}:
            self.report.leaks.append(f"processes that outlive the launcher: {sorted(left)}")
        self.report.seconds = time.monotonic() - began
        return self.report

    def _running(self, vision_ms: float, **replicas: int) -> Running:
        counts = [word for role, count in replicas.items() for word in (f"--{role}", str(count))]
        module = "tests.system.poisoned" if self._options.poison_every else "services.cli"
        arguments = (*counts, "--simulate-vision-ms", str(vision_ms), *ALWAYS)
        return Running(*arguments, module=module)

    async def _references(self) -> dict[Question, Reference]:
        questions = list({call.question: None for call in self._calls if not call.mistake})
        with self._running(0.0, vision=1) as system:
            return await undisturbed(system.grpc_port, questions)

    async def _disturb(self, system: Running, references: dict[Question, Reference]) -> None:
        client = Client(system.http_port, system.grpc_port, system.model)
        faults = Faults(
            system.grpc_port, self._options.seed, self._options.fault_seconds, self._options.faults
        )
        try:
            warm_up = max(WARM_UP_LEAST, round(WARM_UP_SHARE * len(self._calls)))
            await self._ask(client, self._calls[:warm_up], references)
            before = await self._rest(system, faults)
            disturbing = asyncio.create_task(faults.run()) if self._options.fault_seconds else None
            await self._ask(client, self._calls[warm_up:], references)
            if disturbing:
                await ended(disturbing)
            if "scale" in self._options.faults:
                await self._restore(faults)
            after = await self._rest(system, faults)
            self.report.faults = faults.done
            self.report.leaks = at_rest.leaks(before, after, processes_of(system.process.pid))
            self._compare_counts(at_rest.read(system.url("/metrics")))
            self.report.leaks += await blocks_missing(
                system.grpc_port, CONTEXT_TOKENS, self._options.seed
            )
        finally:
            await client.close()
            await faults.close()

    async def _ask(
        self, client: Client, calls: list[Call], references: dict[Question, Reference]
    ) -> None:
        """Keep one call of each client in flight until the calls or the time run out."""
        waiting = iter(calls)
        deadline = time.monotonic() + self._options.seconds
        tally = self.report.tally

        async def one_client() -> None:
            for call in waiting:
                if time.monotonic() > deadline:
                    return
                tally.count(call, await client.ask(call), references)
                if tally.calls % PROGRESS_CALLS == 0:
                    print(
                        f"{tally.calls} calls, {tally.answered} answered, clean so far: "
                        f"{tally.is_clean}",
                        file=sys.stderr,
                    )

        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._options.clients):
                tasks.create_task(one_client())

    async def _restore(self, faults: Faults) -> None:
        """Scale every role to its number of replicas at the start."""
        deadline = time.monotonic() + REST_SECONDS
        for role, replicas in REPLICAS.items():
            while not await faults.scale(role, replicas):
                if time.monotonic() > deadline:
                    self.report.leaks.append(f"{role} could not be scaled back")
                    break
                await asyncio.sleep(LOOK_SECONDS)

    async def _rest(self, system: Running, faults: Faults) -> at_rest.AtRest:
        """Return the state as soon as all members are back and hold no work.

        After a minute the state is returned as it is.
        """
        deadline = time.monotonic() + REST_SECONDS
        while True:
            members = await faults.members()
            state = at_rest.look(system.process.pid, members, at_rest.read(system.url("/metrics")))
            counts = Counter(member.role for member in members)
            is_whole = (
                all(counts[role] == replicas for role, replicas in REPLICAS.items())
                and counts["controller"] + counts["gateway"] == 2
            )
            is_alone = len(processes_of(system.process.pid)) == len(members)
            if (
                is_whole and is_alone and not state.held and not state.requests_in_flight
            ) or time.monotonic() > deadline:
                return state
            await asyncio.sleep(LOOK_SECONDS)

    def _compare_counts(self, metrics: str) -> None:
        """Compare the gateway's counts of requests and their ends with what the clients saw."""
        tally = self.report.tally
        ended = at_rest.metric(metrics, "twinlens_gateway_requests_total")
        self.report.accepted = round(sum(ended.values()))
        answered = round(
            sum(
                value
                for labels, value in ended.items()
                if '"stop"' in labels or '"length"' in labels
            )
        )
        # A client that hangs up may have been answered meanwhile, or not been admitted yet.
        if not tally.answered <= answered <= tally.answered + tally.cancelled + tally.late:
            self.report.leaks.append(
                f"the gateway answered {answered} requests, the clients saw {tally.answered} "
                "answers"
            )


def crashes_of(system: Running) -> list[str]:
    """Return a line for each child that ended by itself, not by a fault of the soak.

    No fault freezes a gateway, so one that was killed as hung had too much to do.
    """
    ended = [
        entry
        for entry in system.logged(event="service exited, restarting it")
        if entry["status"] not in (KILLED, 0)
    ]
    killed = [
        entry for entry in system.logged(event="killed") if entry["name"].startswith("gateway")
    ]
    return [
        *(f"{entry['name']} ended with status {entry['status']}" for entry in ended),
        *(f"{entry['name']} was killed: {entry['reason']}" for entry in killed),
    ]


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def pick(ordered: list[float], share: float) -> float:
    return round(ordered[round(share * (len(ordered) - 1))], 2)
