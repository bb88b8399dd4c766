"""Random messages to the real processes of a running system, over real connections."""

import queue
import time
from random import Random
from typing import Any, get_args

from common.events import Event, PeerUp
from common.hello import hello
from common.hops import CONNECTS
from common.links import Links
from common.messages import HOPS, Beat, Goodbye, Hello, Message, Peer, Prompt, Submit
from tests.fuzz.making import Maker
from tests.fuzz.preprocess import submit
from tests.fuzz.rounds import Result
from tests.fuzz.targets import ATTEMPTS, ITEMS, REQUEST_IDS
from tests.llm.builders import create_prompt
from tests.soak import at_rest
from tests.system.running import ROOT, Running, ask_about, processes_of, until

BURST = 100
"""How many messages an intruder sends before it leaves."""
CONNECT_SECONDS = 20.0
REST_SECONDS = 60.0
VALID_SHARE = 0.3
"""How many of the requests and prompts are valid ones with one change."""


class Processes:
    """Sends messages as a member that the controller does not know."""

    def __init__(self, seed: str) -> None:
        self._draw = Random(seed)
        self._number = 0
        self.result = Result()

    def run(self, count: int) -> Result:
        began = time.perf_counter()
        with Running("--vision", "2", "--log-level", "info") as system:
            for _ in range(3):
                expected = self._answer(system)
            before = look(system)
            for _ in range(count // BURST):
                self._intrude(system)
            until(lambda: is_at_rest(system), "nothing is held", REST_SECONDS)
            after = look(system)
            children = processes_of(system.process.pid)
            self.result.faults += at_rest.leaks(before, after, children)
            if before.processes.keys() != after.processes.keys():
                self.result.faults.append("a process was replaced")
            if self._answer(system) != expected:
                self.result.faults.append("an innocent request is answered differently")
        self.result.seconds = time.perf_counter() - began
        return self.result

    def _answer(self, system: Running) -> Any:
        status, answer = system.chat(ask_about(ROOT / "examples" / "receipt.png"), max_tokens=16)
        return status, answer["choices"]

    def _intrude(self, system: Running) -> None:
        """Connect to a member as one of those that may, send messages, and leave."""
        members = [member for member in system.members() if member.address]
        victim = self._draw.choice(members)
        role = self._draw.choice([r for r, to in sorted(CONNECTS) if to == victim.role])
        self._number += 1
        me = hello(f"{role}-intruder-{self._number}", role, victim.fingerprint)
        events: queue.SimpleQueue[Event[Any]] = queue.SimpleQueue()
        links: Links[Any] = Links(me, "", "", events.put)
        try:
            links.connect(Peer(victim.id, victim.address), victim.role)
            first = events.get(timeout=CONNECT_SECONDS)
            if not isinstance(first, PeerUp):
                self.result.faults.append(f"{victim.id} refuses a {role}: {first}")
                return
            maker = Maker(self._draw, pools(members, me.id))
            kinds = get_args(HOPS[role, victim.role])
            kinds = tuple(kind for kind in kinds if kind not in (Hello, Beat, Goodbye))
            for _ in range(BURST):
                message = self._message(maker, self._draw.choice(kinds))
                links.send(victim.id, message)
                self.result.counts[type(message).__name__] += 1
        finally:
            links.close()

    def _message(self, maker: Maker, kind: type[Any]) -> Message:
        """Return a message of this kind: a random one, or nearly a valid one."""
        request_id = self._draw.choice(REQUEST_IDS)
        attempt = self._draw.choice(ATTEMPTS)
        if kind is Submit and self._draw.random() < VALID_SHARE:
            return maker.mutate(submit(request_id, attempt, self._draw.choice([0, 1, 2]), 0))
        if kind is Prompt and self._draw.random() < VALID_SHARE:
            return maker.mutate(create_prompt(request_id, attempt=attempt, num_tokens=9))
        made: Message = maker.make(kind)
        return made


def pools(members: list[Any], intruder_id: str) -> dict[str, tuple[Any, ...]]:
    """Return the likely values of fields, by name."""
    ids = (intruder_id, *(member.id for member in members))
    peers = tuple(Peer(member.id, member.address) for member in members)
    return {
        "request_id": REQUEST_IDS,
        "attempt": ATTEMPTS,
        "item": ITEMS,
        "gateway_id": ids,
        "preprocess_id": ids,
        "avoid": ids,
        "llm": peers,
        "detokenizer": peers,
    }


def look(system: Running) -> at_rest.AtRest:
    metrics = at_rest.read(system.url("/metrics"))
    return at_rest.look(system.process.pid, system.members(), metrics)


def is_at_rest(system: Running) -> bool:
    state = look(system)
    return not state.held and not state.requests_in_flight
