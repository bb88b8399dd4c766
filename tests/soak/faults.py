"""Seeded random faults: members of a running system are killed, frozen, drained and scaled."""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

import grpc

from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc

KILLED_ROLES = ("preprocess", "vision", "llm", "detokenizer", "controller")
KILLED_WEIGHTS = (4, 6, 4, 4, 1)
LONGEST_FREEZE_SECONDS = 6.0
CONTROL_SECONDS = 5.0
SCALES = {"vision": (2, 4), "preprocess": (1, 3), "detokenizer": (1, 3), "llm": (1, 2)}
"""The fewest and the most replicas that a scaling asks for."""
WEIGHTS = {"kill": 5, "freeze": 4, "drain": 2, "scale": 3}


class Faults:
    def __init__(self, grpc_port: int, seed: int, pause_seconds: float, kinds: list[str]) -> None:
        """Prepare faults of these kinds, one every `pause_seconds` on average."""
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}")
        self._control = control_pb2_grpc.ControlServiceStub(self._channel)
        self._draw = random.Random(seed)
        self._pause = pause_seconds
        ways = {
            "kill": self._kill,
            "freeze": self._freeze,
            "drain": self._drain,
            "scale": self._scale,
        }
        self._ways: list[Callable[[], Awaitable[str]]] = [ways[kind] for kind in kinds]
        self._weights = [WEIGHTS[kind] for kind in kinds]
        self._frozen: set[int] = set()
        self.done: Counter[str] = Counter()

    async def close(self) -> None:
        await self._channel.close()

    async def members(self, role: str = "") -> list[control_pb2.Member]:
        """Return the members that the controller lists as ready; none while it is away."""
        with suppress(grpc.aio.AioRpcError):
            listed = await self._control.ListMembers(
                control_pb2.ListMembersRequest(), timeout=CONTROL_SECONDS
            )
            found = [
                m
                for m in listed.members
                if m.state == control_pb2.MEMBER_STATE_READY and role in ("", m.role)
            ]
            return sorted(found, key=lambda m: m.id)
        return []

    async def run(self) -> None:
        """Cause faults until cancelled, then let frozen members go on."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                while True:
                    await asyncio.sleep(self._draw.uniform(0.5, 1.5) * self._pause)
                    cause = self._draw.choices(self._ways, self._weights)[0]
                    self.done[await cause()] += 1
        finally:
            for pid in self._frozen.copy():
                self._thaw(pid)

    async def scale(self, role: str, replicas: int) -> bool:
        try:
            await self._control.Scale(
                control_pb2.ScaleRequest(role=role, replicas=replicas), timeout=CONTROL_SECONDS
            )
        except grpc.aio.AioRpcError:  # the controller may be away
            return False
        return True

    async def _victim(self) -> control_pb2.Member | None:
        role = self._draw.choices(KILLED_ROLES, KILLED_WEIGHTS)[0]
        found = await self.members(role)
        return self._draw.choice(found) if found else None

    async def _kill(self) -> str:
        if not (victim := await self._victim()):
            return "no member to kill"
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
        return f"{victim.role} killed"

    async def _freeze(self) -> str:
        victim = await self._victim()
        seconds = self._draw.uniform(0.2, LONGEST_FREEZE_SECONDS)
        if not victim:
            return "no member to freeze"
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGSTOP)
        self._frozen.add(victim.pid)
        self._tasks.create_task(self._thaw_later(victim.pid, seconds))
        return f"{victim.role} frozen"

    async def _thaw_later(self, pid: int, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._thaw(pid)

    def _thaw(self, pid: int) -> None:
        self._frozen.discard(pid)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    async def _drain(self) -> str:
        if not (victim := await self._victim()) or victim.role == "controller":
            return "no member to drain"
        try:
            await self._control.Drain(
                control_pb2.DrainRequest(member_id=victim.id), timeout=CONTROL_SECONDS
            )
        except grpc.aio.AioRpcError as error:
            return f"drain: {error.code().name}"
        return f"{victim.role} drained"

    async def _scale(self) -> str:
        role = self._draw.choice(list(SCALES))
        replicas = self._draw.randint(*SCALES[role])
        return f"{role} scaled" if await self.scale(role, replicas) else "scale: no controller"
