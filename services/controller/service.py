"""ControlService over gRPC: a membership table that is fed by one stream per member."""

import asyncio
import time
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
from services.controller.reachability import location_of, unreachable_reason
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
MAX_MEMBERS = 4096
"""Members in the table, including those that died within the last minute."""
MAX_WATCHERS = 4096
ANSWER_SECONDS = 5.0
"""How long a member may take to start draining, and the launcher to accept a replica count."""


class JoinStream:
    """One call of Join, by a member, a watcher, a launcher, or one that is several of these."""

    def __init__(self, first: control_pb2.JoinRequest) -> None:
        self.member_id = first.member.id if first.HasField("member") else ""
        self.is_watching = first.watch
        self.changed = asyncio.Event()
        """Set when there is something to send."""
        self.launcher: JoinedLauncher | None = None
        if first.HasField("managed"):
            self.launcher = JoinedLauncher(first.managed, self.changed.set)

    def objection_to(self, request: control_pb2.JoinRequest) -> str:
        """Return why this stream cannot bring the report: it speaks for one member only."""
        return "" if request.member.id == self.member_id else "it reports as another member"


class ControlServicer(control_pb2_grpc.ControlServiceServicer):
    """The control plane. Its state is soft: after a restart, members join again."""

    def __init__(self, controller: control_pb2.Member) -> None:
        self._table = MembershipTable()
        self._controller = controller
        self._watchers: set[JoinStream] = set()
        self._streams: dict[str, JoinStream] = {}
        """The latest stream of each member by its id."""
        self._locations: dict[str, str] = {}
        """Where each member runs, by its id."""
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
        await self._check_place(first, context)
        await self._check_reachable(first, context)
        stream = JoinStream(first)
        self._open(stream, first)
        reports = asyncio.create_task(self._read_reports(requests, stream))
        try:
            yield self._response(stream)
            while True:
                await stream.changed.wait()
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
        for member_id in self._locations.keys() - known:
            del self._locations[member_id]

    # The streams of Join

    async def _first_report(
        self, requests: AsyncIterator[control_pb2.JoinRequest], context: grpc.aio.ServicerContext
    ) -> control_pb2.JoinRequest | None:
        """Return the first message of a stream, or refuse the call if it is late or malformed."""
        try:
            first = await asyncio.wait_for(anext(requests, None), FIRST_REPORT_SECONDS)
        except TimeoutError:
            reason = f"no report within {FIRST_REPORT_SECONDS:g} s: send one to join"
            await refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, reason)
        if first is not None and (reason := objection_to(first)):
            await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, reason)
        return first

    async def _check_place(
        self, first: control_pb2.JoinRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Refuse a stream that would take the place of a living one, or for which there is no room.

        A member whose connection broke unnoticed joins again once its lease has ended.
        """
        member_id = first.member.id
        if member_id == self._controller.id or (
            member_id in self._streams and self._table.is_alive(member_id)
        ):
            reason = f"there is a living member {member_id}: try again once its lease has ended"
            await refuse(context, grpc.StatusCode.ALREADY_EXISTS, reason)
        if first.HasField("managed") and self._launcher:
            reason = "a launcher has joined already: give each one its own controller"
            await refuse(context, grpc.StatusCode.ALREADY_EXISTS, reason)
        is_new = self._table.get(member_id) is None
        if first.HasField("member") and is_new and len(self._table.members()) >= MAX_MEMBERS:
            reason = f"there are {MAX_MEMBERS} members, which is the most"
            await refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
        if first.watch and len(self._watchers) >= MAX_WATCHERS:
            reason = f"there are {MAX_WATCHERS} watchers, which is the most"
            await refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, reason)

    async def _check_reachable(
        self, first: control_pb2.JoinRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Refuse a member if it and a peer of it could not reach each other."""
        if not first.HasField("member"):
            return
        location = location_of(context.peer())
        others = [
            (other, self._locations[other.id])
            for other in self._table.members()
            if other.state != DEAD and other.id != first.member.id
        ]
        if reason := unreachable_reason(first.member, location, others):
            self._log.warning("refused a member", id=first.member.id, reason=reason)
            await refuse(context, grpc.StatusCode.FAILED_PRECONDITION, reason)
        self._locations[first.member.id] = location

    def _open(self, stream: JoinStream, first: control_pb2.JoinRequest) -> None:
        """Register a new stream. Its own first report does not notify it."""
        self._launcher = stream.launcher or self._launcher
        self._handle_report(first)
        if stream.member_id:
            self._streams[stream.member_id] = stream
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
                if request.HasField("member") and not self._table.is_alive(request.member.id):
                    break  # Its lease ended while it was frozen, so it must join again.
                self._handle_report(request)
                if stream.launcher:
                    stream.launcher.report(request.managed)
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
        return bool(stream.member_id) and not self._table.is_alive(stream.member_id)

    def _on_member_dead(self, member_id: str) -> None:
        self._drains.on_started(member_id)
        self._notify_watchers()

    def _notify_watchers(self) -> None:
        for watcher in self._watchers:
            watcher.changed.set()

    def _response(self, stream: JoinStream) -> control_pb2.JoinResponse:
        launcher = stream.launcher
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
