"""The LoRA adapters of the language groups: which there are, and how they come and go.

Groups report their adapters. A load or unload goes to all connected groups. What this gateway has
loaded it also sends to groups that come later, because they know only their command line.
"""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from common.adapter_names import objection_to_adapter
from common.errors import InvalidRequest, ServingError, Unavailable, from_code
from common.events import PeerUp
from common.logs import get_logger
from common.messages import AdapterChanged, Adapters, LoadAdapter, UnloadAdapter
from services.gateway.peers import Peers

LOAD_SECONDS = 300.0
"""How long groups may take to load an adapter."""


@dataclass(slots=True)
class Change:
    """A load or an unload that groups have not all answered."""

    waiting: set[str]
    """The groups that have not answered."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    errors: list[ServingError] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    """The groups that did it."""

    def leave(self, group: str) -> None:
        """Wait no longer for a group."""
        self.waiting.discard(group)
        if not self.waiting:
            self.done.set()


class AdaptersOfGroups:
    """What this gateway knows about adapters. Everything runs on one asyncio loop."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._reports: dict[str, dict[str, str]] = {}
        """By connected group: the directories of its adapters, by name."""
        self._last: dict[str, str] = {}
        """The adapters of the group that left last. They hold while no group is connected, so that
        requests wait for a restarted group."""
        self._loaded: dict[str, str] = {}
        """What this gateway has loaded."""
        self._changes: dict[str, Change] = {}
        self._tasks = itertools.count(1)
        self._log = get_logger()

    def paths(self) -> dict[str, str]:
        """Return the directories of all adapters that requests may choose, by name."""
        reports = list(self._reports.values()) or [self._last]
        found = {name: path for report in reports for name, path in report.items()}
        return found | self._loaded

    # Events of the connections

    def on_peer_up(self, up: PeerUp) -> None:
        """Load into a new group what was loaded into the others."""
        if up.role != "llm":
            return
        for name, path in self._loaded.items():
            load = LoadAdapter(task=self._next_task(), name=name, path=path)
            self._peers.links.send(up.peer_id, load)

    def on_peer_down(self, peer_id: str) -> None:
        """Wait no longer for the answer of a group that is gone."""
        self._last = self._reports.pop(peer_id, self._last)
        for change in self._changes.values():
            change.leave(peer_id)

    def on_report(self, group: str, report: Adapters) -> None:
        """Note the adapters of a group. One that it has lost was unloaded through any gateway."""
        paths = {adapter.name: adapter.path for adapter in report.adapters}
        for name in self._reports.get(group, {}).keys() - paths.keys():
            self._loaded.pop(name, None)
        self._reports[group] = paths

    def on_changed(self, group: str, answer: AdapterChanged) -> None:
        """Note what a group answers to a load or an unload."""
        change = self._changes.get(answer.task)
        if change is None or group not in change.waiting:
            if answer.code:  # of a load into a new group
                self._log.warning("adapter not loaded again", peer=group, reason=answer.reason)
            return
        if answer.code:
            change.errors.append(from_code(answer.code, answer.reason, "llm"))
        else:
            change.changed.append(group)
        change.leave(group)

    # Called by the API servers

    async def load(self, name: str, path: str, replace: bool = False) -> None:
        """Load an adapter into all connected groups.

        Raises
        ------
        ServingError
            if a group cannot load it. The groups that could unload it again, unless it replaced
            another one there.
        """
        change = await self._change(
            lambda task: LoadAdapter(task=task, name=name, path=path, replace=replace)
        )
        if change.errors:
            for group in [] if replace else change.changed:
                unload = UnloadAdapter(task=self._next_task(), name=name)
                self._peers.links.send(group, unload)
            raise change.errors[0]
        self._loaded[name] = path

    async def unload(self, name: str) -> None:
        """Unload an adapter from all connected groups. Requests that run go on with it.

        Raises
        ------
        ServingError
            if no group has it, none can, or adapters are not unloaded at run time.
        """
        if objection := objection_to_adapter(name, path="any"):
            raise InvalidRequest(objection)
        self._loaded.pop(name, None)
        change = await self._change(lambda task: UnloadAdapter(task=task, name=name))
        if change.errors and not change.changed:
            raise change.errors[0]

    async def _change(self, message: Callable[[str], LoadAdapter | UnloadAdapter]) -> Change:
        """Send a message to all connected groups, and wait for their answers."""
        groups = self._peers.connected("llm")
        if not groups:
            raise Unavailable("no llm is connected", stage="llm", retry_after=1.0)
        task = self._next_task()
        change = self._changes[task] = Change(set(groups))
        for group in groups:
            self._peers.links.send(group, message(task))
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                await change.done.wait()
        except TimeoutError:
            reason = f"{', '.join(sorted(change.waiting))} did not answer in {LOAD_SECONDS:g} s"
            change.errors.append(Unavailable(reason, stage="llm"))
        finally:
            del self._changes[task]
        if not change.errors and not change.changed:
            raise Unavailable("all language groups were lost", stage="llm", retry_after=1.0)
        return change

    def _next_task(self) -> str:
        return f"adapter-{next(self._tasks)}"


def check_adapter(model_name: str, name: str, path: str) -> None:
    """Raise InvalidRequest if no adapter can have this name or this directory."""
    if name == model_name:
        raise InvalidRequest(f"{name!r} is the served model: give the adapter another name")
    if objection := objection_to_adapter(name, path):
        raise InvalidRequest(objection)
