"""What the launcher keeps running, and what it is asked to keep: wishes stand until it reports
them."""

import asyncio
from collections.abc import Callable

from common.settings import MAX_REPLICAS, SCALABLE_ROLES
from proto.twinlens.control.v1 import control_pb2


class Superseded(Exception):
    """Another wish for the same role took this one's place; the message says which."""


class Gone(Exception):
    """The launcher left before it took the wish up."""


class Launcher:
    """A launcher that joined. `tell` has it hear of `wanted`."""

    def __init__(self, managed: control_pb2.Managed, tell: Callable[[], None]) -> None:
        self.managed = managed
        self.tell = tell
        self.wanted: dict[str, int] = {}
        self._waiting: dict[str, asyncio.Future[None]] = {}

    def ask(self, role: str, replicas: int) -> asyncio.Future[None]:
        """Done when the launcher keeps so many; raises Superseded or Gone."""
        if role in self._waiting and self.wanted[role] == replicas:
            return self._waiting[role]
        if old := self._waiting.pop(role, None):
            old.set_exception(Superseded(f"{role} is to be scaled to {replicas} by a later call"))
        self.wanted[role] = replicas
        self._waiting[role] = asyncio.get_running_loop().create_future()
        self._settle()
        self.tell()
        return self._waiting.get(role) or done()

    def report(self, managed: control_pb2.Managed) -> None:
        self.managed = managed
        self._settle()

    def end(self) -> None:
        for waiting in self._waiting.values():
            waiting.set_exception(Gone("the launcher is gone"))
        self._waiting.clear()

    def _settle(self) -> None:
        for role in [
            role
            for role, replicas in self.wanted.items()
            if self.managed.replicas.get(role) == replicas
        ]:
            del self.wanted[role]
            if waiting := self._waiting.pop(role, None):
                waiting.set_result(None)


def done() -> asyncio.Future[None]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future


def bad_wish(role: str, replicas: int) -> str:
    """Why no launcher could do it; empty where one could."""
    if role not in SCALABLE_ROLES:
        return (
            f"role {role!r} cannot be scaled here: give one of "
            f"{', '.join(SCALABLE_ROLES)} (one gateway and one controller run at a time)"
        )
    if not 1 <= replicas <= MAX_REPLICAS:
        return (
            f"{role} {replicas}: give 1 to {MAX_REPLICAS} replicas; to have none, stop the system"
        )
    return ""


def no_launcher(role: str, replicas: int) -> str:
    kind = "statefulset" if role == "llm" else "deployment"
    return (
        "no launcher manages these members: where Compose runs them, use "
        f"`docker compose up -d --no-recreate --scale {role}={replicas}`; on Kubernetes `kubectl "
        f"scale {kind}/{role} --replicas={replicas}`"
    )
