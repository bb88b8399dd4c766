"""ControlService over gRPC: a membership table that is fed by one stream per member."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Never

import grpc

from common.errors import ServingError, shorten
from common.logs import get_logger
from common.membership import DEAD, DRAINING, state_name
from common.progress import LEASE_SECONDS
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from services.controller.draining import Drains
from services.controller.membership_table import MembershipTable
from services.controller.metrics import ControllerMetrics
from services.controller.places import Places, Refused
from services.controller.reachability import LOCAL, location_of
from services.controller.report_checks import objection_to
from services.controller.scaling import (
    JoinedLauncher,
    LauncherGone,
    Superseded,
    invalid_scale_reason,
    no_launcher_reason,
)

TICK_SECONDS = 1.0
"""How often leases are checked and the launcher gets the load of all members."""
FIRST_REPORT_SECONDS = 5.0
"""How long a stream may take to send its first message."""
MAX_SILENT_STREAMS = 256
"""Streams that have sent nothing yet."""
REPORT_SECONDS = 0.01
"""The least time between two reports of a stream that are handled."""
LIST_SECONDS_PER_MEMBER = 0.0005
"""The least time between two lists for one watcher, for each member that they have. So many changes
at once, as at a start, become few lists, and those that a second has cost the same in any fleet. A
change after a quiet time is listed at once."""
ANSWER_SECONDS = 5.0
"""How long a member may take to start draining, and the launcher to accept a replica count."""


class JoinStream:
    """One call of Join, by a member, a watcher, a launcher, or one that is several of these."""

    def __init__(self, first: control_pb2.JoinRequest, location: str = LOCAL) -> None:
        self.member_id = first.member.id if first.HasField("member") else ""
        self.role = first.member.role
        self.location = location
        self.is_watching = first.watch
        self.changed = asyncio.Event()
        """Set when there is something to send."""
        self.listed_at = 0.0
        """When it got the last list of members, if it watches."""
        self.launcher: JoinedLauncher | None = None
        if first.HasField("managed"):
            self.launcher = JoinedLauncher(first.managed, self.changed.set)

    def objection_to(self, request: control_pb2.JoinRequest) -> str:
        """Return why this stream cannot bring the report: it speaks for one member only."""
        is_same = (request.member.id, request.member.role) == (self.member_id, self.role)
        return "" if is_same else "it reports as another member"


class ControlServicer(control_pb2_grpc.ControlServiceServicer):
    """The control plane. Its state is soft: after a restart, members join again."""

    def __init__(self, controller: control_pb2.Member, launcher_key: str = "") -> None:
        """`launcher_key` is what a launcher must know. If it is empty, the first one may stay."""
        self._table = MembershipTable()
        self.metrics = ControllerMetrics(self._table)
        self._places = Places(self._table, controller.id, launcher_key)
        self._silent: OrderedDict[object, asyncio.Timeout] = OrderedDict()
        """What ends each stream that has sent nothing yet, the oldest one first."""
        self._controller = controller
        self._watchers: set[JoinStream] = set()
        self._streams: dict[str, JoinStream] = {}
        """The latest stream of each member by its id."""
        self._drains = Drains(self._table)
        self._launcher: JoinedLauncher | None = None
        self._log = get_logger()

    # The RPCs

    async def Join(
        self, requests: AsyncIterator[control_pb2.JoinRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.JoinResponse]:
        first = await self._first_report(requests, context)
        if first is None:
            return
        location = location_of(context.peer())
        await self._check_place(first, location, context)
        stream = JoinStream(first, location)
        self._open(stream, first)
        reports = asyncio.create_task(self._read_reports(requests, stream))
        try:
            yield self._response(stream)
            while True:
                await stream.changed.wait()
                if stream.is_watching:
                    await asyncio.wait({reports}, timeout=self._list_pause(stream))
                stream.changed.clear()
                if reports.done() or self._has_died(stream):
                    return
                yield self._response(stream)
        finally:
            reports.cancel()
            self._close(stream)

    async def ListMembers(
        self, request: control_pb2.ListMembersRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ListMembersResponse:
        return control_pb2.ListMembersResponse(members=self._members())

    async def Drain(
        self, request: control_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.DrainResponse:
        member = await self._find_drainable(request.member_id, context)
        self._drains.drained.add(member.id)
        self._notify_launcher()
        if member.state != DRAINING:
            await self._request_drain(member.id, context)
        return control_pb2.DrainResponse(member=self._table.get(member.id))

    async def Scale(
        self, request: control_pb2.ScaleRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ScaleResponse:
        role = request.role
        replicas = request.replicas
        launcher = await self._find_launcher(role, replicas, context)
        before = launcher.managed.replicas[role]
        accepted = launcher.request_replicas(role, replicas)
        try:
            await asyncio.wait_for(asyncio.shield(accepted), ANSWER_SECONDS)
        except Superseded as e:
            await refuse(context, grpc.StatusCode.ABORTED, str(e))
        except (LauncherGone, TimeoutError):
            reason = "the launcher does not answer: try again"
            await refuse(context, grpc.StatusCode.ABORTED, reason)
        self._log.info("scaled", role=role, replicas=replicas, before=before)
        return control_pb2.ScaleResponse(replicas=replicas, replicas_before=before)

    # Leases

    async def expire_leases(self) -> None:
        """End the leases of silent members, for ever.

        A frozen process is silent though its connection is open. Each tick also sends the launcher
        all members, because a change of load alone does not notify it.
        """
        while True:
            await asyncio.sleep(TICK_SECONDS)
            for member_id in self._table.expire(time.monotonic()):
                reason = f"silent for {LEASE_SECONDS:.0f} s"
                self._log.warning("member dead", id=member_id, reason=reason)
                self._on_member_dead(member_id)
            self._forget_removed_members()
            self._notify_launcher()

    def _forget_removed_members(self) -> None:
        known = {member.id for member in self._table.members()}
        self._drains.keep(known)
        self._places.keep(known)

    # The streams of Join

    async def _first_report(
        self, requests: AsyncIterator[control_pb2.JoinRequest], context: grpc.aio.ServicerContext
    ) -> control_pb2.JoinRequest | None:
        """Return the first message of a stream, or refuse the call if it is late or malformed.

        Members report at once. So if many streams say nothing, the oldest one is ended early.
        """
        if len(self._silent) >= MAX_SILENT_STREAMS:
            _, oldest = self._silent.popitem(last=False)
            oldest.reschedule(asyncio.get_running_loop().time())
        me = object()
        try:
            async with asyncio.timeout(FIRST_REPORT_SECONDS) as timeout:
                self._silent[me] = timeout
                first = await anext(requests, None)
        except TimeoutError:
            reason = f"no report within {FIRST_REPORT_SECONDS:g} s: send one to join"
            await refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, reason)
        finally:
            self._silent.pop(me, None)
        if first is not None and (reason := objection_to(first)):
            await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, reason)
        return first

    async def _check_place(
        self,
        first: control_pb2.JoinRequest,
        location: str,
        context: grpc.aio.ServicerContext,
    ) -> None:
        """Refuse a stream that would take the place of another caller, or that has no room."""
        try:
            if first.HasField("managed"):
                self._places.check_launcher(first.key, self._launcher is not None)
            if first.watch and not first.HasField("managed"):
                watching = [watcher.location for watcher in self._watchers]
                self._places.check_watcher(location, watching)
            if first.HasField("member"):
                self._places.check_member(first.member, first.key, location)
        except Refused as e:
            self._log.warning("refused to join", id=first.member.id, reason=e.reason)
            await refuse(context, e.code, e.reason)

    def _open(self, stream: JoinStream, first: control_pb2.JoinRequest) -> None:
        """Register a new stream. Its own first report does not notify it."""
        self._launcher = stream.launcher or self._launcher
        self._handle_report(first)
        if stream.member_id:
            former = self._streams.get(stream.member_id)
            self._streams[stream.member_id] = stream
            if former:
                former.changed.set()  # ends it
        if stream.is_watching:
            self._watchers.add(stream)

    def _close(self, stream: JoinStream) -> None:
        self._watchers.discard(stream)
        if stream.launcher:
            stream.launcher.leave()
            if self._launcher is stream.launcher:
                self._launcher = None
        # A member may have joined again before the controller sees that its old stream broke.
        if stream.member_id and self._streams.get(stream.member_id) is stream:
            del self._streams[stream.member_id]
            if self._table.mark_dead(stream.member_id, time.monotonic()):
                self._log.info("member gone", id=stream.member_id, reason="it left")
                self._on_member_dead(stream.member_id)

    async def _read_reports(
        self, requests: AsyncIterator[control_pb2.JoinRequest], stream: JoinStream
    ) -> None:
        """Handle the reports of a stream until it ends or its member is dead."""
        try:
            async for request in requests:
                if reason := objection_to(request) or stream.objection_to(request):
                    self._log.warning("dropped a member", id=stream.member_id, reason=reason)
                    break
                if self._has_died(stream):
                    break  # Its lease ended while it was frozen, so it must join again.
                self._handle_report(request)
                if stream.launcher:
                    stream.launcher.report(request.managed)
                await asyncio.sleep(REPORT_SECONDS)
        except (grpc.RpcError, asyncio.CancelledError, ServingError):
            pass  # The stream broke, or what came is not a report.
        finally:
            stream.changed.set()

    def _handle_report(self, request: control_pb2.JoinRequest) -> None:
        member = request.member
        if request.HasField("member") and self._table.report(member, time.monotonic()):
            state = state_name(member.state)
            self._log.debug("member", id=member.id, state=state, address=member.address)
            if member.state == DRAINING:
                self._drains.on_started(member.id)
            self._notify_watchers()

    def _has_died(self, stream: JoinStream) -> bool:
        """Whether the stream's member is dead, or has another stream by now."""
        if not stream.member_id:
            return False
        is_latest = self._streams.get(stream.member_id) is stream
        return not is_latest or not self._table.is_alive(stream.member_id)

    def _on_member_dead(self, member_id: str) -> None:
        self._drains.on_started(member_id)
        self._notify_watchers()

    def _notify_watchers(self) -> None:
        for watcher in self._watchers:
            watcher.changed.set()

    def _list_pause(self, stream: JoinStream) -> float:
        """Return how long further changes are waited for before the next list is sent."""
        due = stream.listed_at + LIST_SECONDS_PER_MEMBER * len(self._table)
        return max(0.0, due - time.monotonic())

    def _response(self, stream: JoinStream) -> control_pb2.JoinResponse:
        launcher = stream.launcher
        stream.listed_at = time.monotonic()
        return control_pb2.JoinResponse(
            lease_seconds=LEASE_SECONDS,
            members=self._members() if stream.is_watching else [],
            drain=self._drains.is_requested(stream.member_id),
            wanted=launcher.wanted if launcher else None,
            drained=self._drains.drained if launcher else None,
        )

    def _members(self) -> list[control_pb2.Member]:
        return [self._controller, *self._table.members()]

    # Draining

    async def _find_drainable(
        self, member_id: str, context: grpc.aio.ServicerContext
    ) -> control_pb2.Member:
        """Return the member that must drain, or refuse the call if no member can."""
        if member_id == self._controller.id:
            reason = "the controller has nothing to drain: stop it; requests go on without it"
            await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, reason)
        member = self._table.get(member_id)
        if member:
            member = self._drains.leader_of(member)
        if member is None or member.state == DEAD:
            name = shorten(member_id)
            reason = f"there is no member {name!r}: `twinlens status` lists the members"
            await refuse(context, grpc.StatusCode.NOT_FOUND, reason)
        if self._drains.is_last_ready(member):
            is_gateway = member.role == "gateway"
            how = "start another gateway" if is_gateway else f"run `twinlens scale {member.role} 2`"
            reason = f"{member.id} is the last ready {member.role}, and requests need it: {how}"
            await refuse(context, grpc.StatusCode.FAILED_PRECONDITION, f"{reason} first")
        return member

    async def _request_drain(self, member_id: str, context: grpc.aio.ServicerContext) -> None:
        """Ask the member to drain, and wait until it has started."""
        started = self._drains.request(member_id)
        self._streams[member_id].changed.set()
        try:
            await asyncio.wait_for(started.wait(), ANSWER_SECONDS)
        except TimeoutError:
            reason = f"{member_id} does not answer yet; it will drain when it does"
            await refuse(context, grpc.StatusCode.ABORTED, reason)

    # Scaling

    async def _find_launcher(
        self, role: str, replicas: int, context: grpc.aio.ServicerContext
    ) -> JoinedLauncher:
        """Return the launcher, or refuse the call if it cannot keep this many replicas."""
        if reason := invalid_scale_reason(role, replicas):
            await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, reason)
        launcher = self._launcher
        if launcher is None:
            reason = no_launcher_reason(role, replicas)
            await refuse(context, grpc.StatusCode.FAILED_PRECONDITION, reason)
        if role not in launcher.managed.replicas:
            reason = f"the served model needs no {role} replicas, so none can be started"
            await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, reason)
        if bounds := launcher.managed.autoscaled.get(role):
            reason = (
                f"the launcher scales {role} by itself (--autoscale {role}={bounds}): "
                "to scale it by hand, restart the launcher without that flag"
            )
            await refuse(context, grpc.StatusCode.FAILED_PRECONDITION, reason)
        return launcher

    def _notify_launcher(self) -> None:
        if self._launcher:
            self._launcher.notify()


async def refuse(context: grpc.aio.ServicerContext, code: grpc.StatusCode, reason: str) -> Never:
    """End the call with an error. `context.abort` raises, so this never returns."""
    await context.abort(code, reason)
    raise AssertionError("abort raises")
