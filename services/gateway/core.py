"""The gateway's core: it owns every request from admission to its one end."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np

from common.errors import DeadlineExceeded, Exhausted, Internal, NotFound, ServingError, Unavailable, from_code
from common.links import Down, Received, Up
from common.links import Event as LinkEvent
from common.logs import get_logger
from common.membership import DEAD, READY
from common.messages import Abort, Delta, Failed, Peer, Routed, Submit
from common.wire import Tensor
from proto.twinlens.control.v1 import control_pb2
from services.gateway.generation import Began, Ended, Event, GenerationRequest, Piece
from services.gateway.pace import Pace
from services.gateway.record import Attempt, Record

STAGES = ("preprocess", "vision", "llm", "detokenizer")
CONNECTED_STAGES = ("preprocess", "llm", "detokenizer")
REMEMBERED_IDS = 20_000
"""As many as a language group remembers of requests that ended."""
MAX_ATTEMPTS = 4
REMEMBERED_PEERS = 32


class GatewayCore:
    """Runs on one asyncio loop; `hear` and `hear_members` are called on it, too."""

    def __init__(self, model_name: str, max_waiting: int, request_timeout: float) -> None:
        self.model_name = model_name
        self._max_waiting, self._request_timeout = max_waiting, request_timeout
        self._records: dict[str, Record] = {}
        self._seen_ids: dict[str, None] = {}
        self._up: dict[str, Up] = {}
        self._members: list[control_pb2.Member] = []
        self._unheard: dict[str, list[Abort]] = {}
        self._stopping = False
        self._pace = Pace()
        self._idle = asyncio.Event()
        self._log = get_logger()
        self.links: Any = None

    # What the doors call

    @contextlib.asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncIterator[AsyncIterator[Event]]:
        record = self._admit(request)
        try:
            async with contextlib.aclosing(self._events(record, self._timeout(request))) as events:
                yield events
        finally:
            if record.request.request_id in self._records:
                self._forget(record)
                self._abort(record)

    def check_model(self, model: str | None) -> None:
        if model and model != self.model_name:
            raise NotFound(f"no model {model!r} is served here; served: {self.model_name!r}")

    def max_model_len(self) -> int | None:
        return max((m.max_model_len for m in self._members if m.role == "llm" and m.state == READY), default=0) or None

    def not_ready(self) -> str:
        missing = [role for role in STAGES if not any(m.role == role and m.state == READY for m in self._members)]
        missing += [role for role in CONNECTED_STAGES if role not in missing and not self._connected(role)]
        return f"no {' and no '.join(missing)} is ready" if missing else ""

    async def stop(self, grace: float) -> None:
        """Refuses new requests, lets those under way end within the grace (seconds), and ends the others with an error."""
        self._stopping = True
        if self._records:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), grace)
        for record in list(self._records.values()):
            self._fail(record, Unavailable("the gateway is stopping: try again", stage="gateway", retry_after=1.0))

    def load(self) -> tuple[int, int]:
        """(in_flight, queued) for the control plane."""
        return len(self._records), 0

    # What the connections tell

    def hear_members(self, members: list[control_pb2.Member]) -> None:
        self._members = [m for m in members if m.state != DEAD]

    def hear(self, event: LinkEvent) -> None:
        match event:
            case Received(message=message):
                self._take(message)
            case Up(peer_id=peer_id):
                self._up[peer_id] = event
                for abort in self._unheard.pop(peer_id, []):
                    self.links.send(peer_id, abort)
            case Down(peer_id=peer_id, role=role, reason=reason):
                self._up.pop(peer_id, None)
                self._log.warning("peer gone", peer=peer_id, reason=reason)
                for record in [r for r in self._records.values() if r.attempt.depends_on(peer_id)]:
                    self._go_on_elsewhere(record, peer_id, Unavailable(f"{role} was lost while it held the request: {reason}", stage=role))

    # From here on ours

    def _admit(self, request: GenerationRequest) -> Record:
        if self._stopping:
            raise Unavailable("the gateway is stopping: try again", stage="gateway", retry_after=1.0)
        if missing := [role for role in CONNECTED_STAGES if not self._connected(role)]:
            raise Unavailable(f"no {' and no '.join(missing)} is connected: try again in a moment", stage="gateway", retry_after=1.0)
        waiting, timeout = self._num_waiting(), self._timeout(request)
        wait = self._pace.expected_wait(waiting)
        if waiting >= self._max_waiting:
            raise Exhausted(f"{waiting} requests are waiting, which is the limit: try again later", "gateway", retry_after=max(1.0, wait))
        if wait > timeout:
            reason = f"{waiting} requests are waiting and take about {wait:.0f} s, the deadline is in {timeout:g} s: try again later"
            raise Exhausted(reason, "gateway", retry_after=max(1.0, wait - timeout))
        record = Record(self._renamed(request), self._new_attempt(0))
        self._submit(record)
        self._records[record.request.request_id] = record
        return record

    def _num_waiting(self) -> int:
        return sum(record.first_token is None for record in self._records.values())

    def _timeout(self, request: GenerationRequest) -> float:
        return self._request_timeout if request.timeout is None else request.timeout

    def _renamed(self, request: GenerationRequest) -> GenerationRequest:
        """Clients and proxies send an id again; the stages drop what comes for a request that ended, so here each has its own."""
        if request.request_id in self._seen_ids:
            request = replace(request, request_id=f"{request.request_id}~{secrets.token_hex(3)}")
        self._seen_ids[request.request_id] = None
        if len(self._seen_ids) > REMEMBERED_IDS:
            del self._seen_ids[next(iter(self._seen_ids))]
        return request

    def _go_on_elsewhere(self, record: Record, lost: str, error: Unavailable) -> None:
        """A new attempt that continues after the tokens the client has, where another member can take the place of the one lost."""
        if record.attempt.number + 1 == MAX_ATTEMPTS or not all(map(self._connected, CONNECTED_STAGES)):
            self._fail(record, error)
            return
        self._abort(record)
        record.attempt = self._new_attempt(record.attempt.number + 1)
        self._log.warning("goes on elsewhere", request_id=record.request.request_id, attempt=record.attempt.number, reason=error.message)
        self._submit(record, avoid=lost)

    def _new_attempt(self, number: int) -> Attempt:
        return Attempt(number, self._choose("preprocess"), self._choose("detokenizer"))

    def _choose(self, role: str) -> str:
        """Of the connected ones, the one that holds the fewest of our requests; ready ones first."""
        connected = self._connected(role)
        ready = {m.id for m in self._members if m.state == READY}.intersection(connected)
        held = dict.fromkeys(ready or connected, 0)
        for attempt in (record.attempt for record in self._records.values()):
            holder = attempt.preprocess if role == "preprocess" else attempt.detokenizer
            if holder in held and (role != "preprocess" or not attempt.llm):
                held[holder] += 1
        return min(held, key=held.__getitem__)

    def _connected(self, role: str) -> list[str]:
        return [peer_id for peer_id, up in self._up.items() if up.role == role]

    def _submit(self, record: Record, avoid: str = "") -> None:
        request, attempt = record.request, record.attempt
        self.links.send(
            attempt.preprocess,
            Submit(
                request_id=request.request_id,
                attempt=attempt.number,
                prompt_kind=request.prompt_kind,
                prompt=prompt_tensor(request),
                images=tuple(map(Tensor.of_bytes, request.images)),
                sampling=request.sampling,
                stopping=request.stopping,
                detokenizer=Peer(attempt.detokenizer, self._up[attempt.detokenizer].address),
                timeout=max(0.0, record.admitted + self._timeout(request) - time.monotonic()),
                return_prompt_token_ids=request.return_prompt_token_ids,
                guide_kind=request.guide_kind,
                guide=Tensor.of_text(request.guide) if request.guide else None,
                output_token_ids=Tensor.of(np.array(record.token_ids, np.int64)) if record.token_ids else None,
                avoid=avoid,
            ),
        )

    async def _events(self, record: Record, timeout: float) -> AsyncGenerator[Event, None]:
        deadline = record.admitted + timeout
        while True:
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                    event = await record.events.get()
            except TimeoutError:
                raise DeadlineExceeded(f"no answer within {timeout:g} s", stage="gateway") from None
            if isinstance(event, ServingError):
                raise event
            yield event
            if isinstance(event, Ended):
                return

    def _take(self, message: Any) -> None:
        record = self._records.get(message.request_id)
        if record is None or record.attempt.number != message.attempt:
            if isinstance(message, Routed):  # it ended before we knew whom to tell
                self.links.connect(message.llm, "llm")
                self.links.send(message.llm.id, Abort(request_id=message.request_id, attempt=message.attempt))
            return
        match message:
            case Routed(llm=llm, prompt_token_ids=ids):
                record.attempt.llm = llm.id
                record.prompt_token_ids = None if ids is None else ids.numpy().tolist()
                self.links.connect(llm, "llm")
                early, record.attempt.early = record.attempt.early, []
                for delta in early:
                    self._take(delta)
            case Delta() if not record.attempt.llm:
                record.attempt.early.append(message)
            case Delta():
                self._extend(record, message)
            case Failed(image=int()) if record.attempt.is_answering:
                pass  # the prefix cache had that image: the answer goes on without it
            case Failed(code=code, message=text, stage=stage, image=image):
                self._fail(record, from_code(code, text, stage, image))

    def _extend(self, record: Record, delta: Delta) -> None:
        """Tokens follow one another without a gap: a delta that does not is our own mistake and ends the request."""
        if delta.offset != len(record.token_ids):
            self._fail(record, Internal(f"tokens from {delta.offset} on came after {len(record.token_ids)}", stage="detokenizer"))
            return
        record.attempt.is_answering = True
        if record.first_token is None:
            record.first_token = time.monotonic()
            self._pace.first_token(record.first_token, self._num_waiting())
            record.events.put_nowait(Began(record.prompt_token_ids))
        ids = delta.token_ids.numpy().tolist()
        record.token_ids += ids
        logprobs = json.loads(delta.logprobs.bytes()) if delta.logprobs else []
        record.events.put_nowait(Piece(delta.offset, ids, delta.text.text(), logprobs))
        if delta.finish_reason:
            self._forget(record)
            assert delta.timings is not None
            timings = json.loads(delta.timings.bytes()) | {
                "time_to_first_token_seconds": record.first_token - record.admitted,
                "total_seconds": time.monotonic() - record.admitted,
            }
            record.events.put_nowait(Ended(delta.finish_reason, delta.usage, timings))
            self._log.info(
                "answered",
                request_id=record.request.request_id,
                finish_reason=delta.finish_reason,
                tokens=len(record.token_ids),
                seconds=round(timings["total_seconds"], 3),
            )

    def _fail(self, record: Record, error: ServingError) -> None:
        self._forget(record)
        self._abort(record)
        self._log.warning("failed", request_id=record.request.request_id, code=error.code, stage=error.stage, reason=error.message)
        record.events.put_nowait(error)

    def _forget(self, record: Record) -> None:
        del self._records[record.request.request_id]
        if not self._records:
            self._idle.set()

    def _abort(self, record: Record) -> None:
        """Every stage that holds something for the request frees it; the language group tells the detokenizer."""
        attempt = record.attempt
        abort = Abort(request_id=record.request.request_id, attempt=attempt.number)
        for peer_id in filter(None, (attempt.preprocess, attempt.llm)):
            if peer_id not in self._up:
                self._keep(peer_id, abort)
            self.links.send(peer_id, abort)

    def _keep(self, peer_id: str, abort: Abort) -> None:
        """A member that was frozen for a moment comes back under its id, and may hold, or still get, what we gave up."""
        self._unheard.setdefault(peer_id, []).append(abort)
        if len(self._unheard) > REMEMBERED_PEERS:
            del self._unheard[next(iter(self._unheard))]


def prompt_tensor(request: GenerationRequest) -> Tensor:
    if request.prompt_kind == "token_ids":
        return Tensor("int64", (len(request.prompt) // 8,), request.prompt)
    return Tensor.of_bytes(request.prompt)
