"""The launcher that has joined, and the replica counts that it has been asked to keep.

The controller repeats a wanted count to the launcher until the launcher reports that it keeps it.
"""

import asyncio
from collections.abc import Callable

from common.errors import shorten
from common.settings import MAX_REPLICAS, SCALABLE_ROLES
from proto.twinlens.control.v1 import control_pb2


class Superseded(Exception):
    """A later call asked for another replica count of the same role; the message says which."""


class LauncherGone(Exception):
    """The launcher left before it accepted the replica count."""


class JoinedLauncher:
    """A launcher that has joined the controller.

    `managed` is what the launcher reported last. `notify` makes its stream send it `wanted`.
    """

    def __init__(self, managed: control_pb2.Managed, notify: Callable[[], None]) -> None:
        self.managed = managed
        self.notify = notify
        self.wanted: dict[str, int] = {}
        """Replica counts by role that the launcher has not accepted yet."""
        self._accepted: dict[str, asyncio.Future[None]] = {}

    def request_replicas(self, role: str, replicas: int) -> asyncio.Future[None]:
        """Ask for a replica count, and return a future that is done once the launcher keeps it.

        The future raises Superseded or LauncherGone if that does not happen.
        """
        if role in self._accepted and self.wanted[role] == replicas:
            return self._accepted[role]
        if old := self._accepted.pop(role, None):
            old.set_exception(Superseded(f"a later call scales {role} to {replicas}"))
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.wanted[role] = replicas
        self._accepted[role] = accepted
        self._resolve()
        self.notify()
        return accepted

    def report(self, managed: control_pb2.Managed) -> None:
        """Store what the launcher keeps now."""
        self.managed = managed
        self._resolve()

    def leave(self) -> None:
        """End all requests, because the launcher has left."""
        for accepted in self._accepted.values():
            accepted.set_exception(LauncherGone("the launcher has left"))
        self._accepted.clear()

    def _resolve(self) -> None:
        """End the requests that the launcher has fulfilled."""
        for role, replicas in list(self.wanted.items()):
            if self.managed.replicas.get(role) == replicas:
                del self.wanted[role]
                if accepted := self._accepted.pop(role, None):
                    accepted.set_result(None)


def invalid_scale_reason(role: str, replicas: int) -> str:
    """Return why no launcher could keep this many replicas; empty if one could."""
    if role not in SCALABLE_ROLES:
        return (
            f"role {shorten(role)!r} cannot be scaled: use one of {', '.join(SCALABLE_ROLES)} "
            "(there is always one gateway and one controller)"
        )
    if not 1 <= replicas <= MAX_REPLICAS:
        return (
            f"{role} cannot have {replicas} replicas: use 1 to {MAX_REPLICAS}; "
            "to have none, stop the system"
        )
    return ""


def no_launcher_reason(role: str, replicas: int) -> str:
    """Return how to scale a system that no launcher manages."""
    kind = "statefulset" if role == "llm" else "deployment"
    return (
        "no launcher manages these members: on Docker Compose, use "
        f"`docker compose up -d --no-recreate --scale {role}={replicas}`; on Kubernetes, use "
        f"`kubectl scale {kind}/{role} --replicas={replicas}`"
    )
