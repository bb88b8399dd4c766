"""ControlService over gRPC: a membership table fed by one stream a member."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Never

import grpc

from common.logs import get_logger
from common.membership import DEAD, DRAINING, READY, state_name
from common.progress import LEASE_SECONDS
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from services.controller.membership_table import MembershipTable
from services.controller.reachability import objection_to, place_of
from services.controller.scaling import Gone, Launcher, Superseded, bad_wish, no_launcher

TICK_SECONDS = 1.0
ANSWER_SECONDS = 5.0
"""For a member to begin draining, or a launcher to take a wish up."""


class ControlServicer(control_pb2_grpc.ControlServiceServicer):
    def __init__(self, myself: control_pb2.Member) -> None:
        self._table = MembershipTable()
        self._myself = myself
        self._watchers: set[asyncio.Event] = set()
        self._streams: dict[str, asyncio.Event] = {}
        self._places: dict[str, str] = {}
        self._draining: dict[str, asyncio.Event] = {}
        self._drained: set[str] = set()
        self._launcher: Launcher | None = None
        self._log = get_logger()

    async def Join(
        self, requests: AsyncIterator[control_pb2.JoinRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.JoinResponse]:
        first = await anext(requests, None)
        if first is None:
            return
        member_id = first.member.id if first.HasField("member") else None
        await self._admit(first, context)
        news = asyncio.Event()
        launcher = Launcher(first.managed, news.set) if first.HasField("managed") else None
        self._launcher = launcher or self._launcher
        self._take(first)
        if member_id:
            self._streams[member_id] = news
        reports = asyncio.create_task(self._take_reports(requests, news, launcher))
        if first.watch:
            self._watchers.add(news)
        try:
            yield self._response(first.watch, member_id, launcher)
            while True:
                await news.wait()
                news.clear()
                if reports.done() or (member_id and not self._table.lives(member_id)):
                    return
                yield self._response(first.watch, member_id, launcher)
        finally:
            reports.cancel()
            self._watchers.discard(news)
            self._forget_launcher(launcher)
            # A member may have joined anew before the break of its old stream is seen.
            if member_id and self._streams.get(member_id) is news:
                del self._streams[member_id]
                self._end(member_id, "it left")

    async def ListMembers(
        self, request: control_pb2.ListMembersRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ListMembersResponse:
        return control_pb2.ListMembersResponse(members=self._members())

    async def Drain(
        self, request: control_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.DrainResponse:
        if request.member_id == self._myself.id:
            reason = "the controller holds no requests: stop it, and the others go on without it"
            await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, reason)
        member = self._leader_of(self._table.get(request.member_id))
        if member is None or member.state == DEAD:
            await refuse(
                context,
                grpc.StatusCode.NOT_FOUND,
                f"no member {request.member_id!r}: `twinlens status` lists them",
            )
        if (
            member.state == READY
            and member.id not in self._draining
            and not self._others_ready(member)
        ):
            wish = (
                f"`twinlens scale {member.role} 2`"
                if member.role != "gateway"
                else "another gateway"
            )
            reason = (
                f"{member.id} is the last ready {member.role}: requests would "
                f"wait for the next one; start one first, by {wish}"
            )
            await refuse(context, grpc.StatusCode.FAILED_PRECONDITION, reason)
        self._drained.add(member.id)
        if self._launcher:
            self._launcher.tell()
        if member.state != DRAINING:
            begun = self._draining.setdefault(member.id, asyncio.Event())
            self._streams[member.id].set()
            try:
                await asyncio.wait_for(begun.wait(), ANSWER_SECONDS)
            except TimeoutError:
                reason = f"{member.id} does not answer; it drains as soon as it does"
                await refuse(context, grpc.StatusCode.ABORTED, reason)
        return control_pb2.DrainResponse(member=self._table.get(member.id))

    async def Scale(
        self, request: control_pb2.ScaleRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ScaleResponse:
        role = request.role
        replicas = request.replicas
        launcher = self._launcher
        if reason := bad_wish(role, replicas):
            await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, reason)
        if launcher is None:
            await refuse(context, grpc.StatusCode.FAILED_PRECONDITION, no_launcher(role, replicas))
        if bounds := launcher.managed.autoscaled.get(role):
            reason = (
                f"{role} is scaled by the launcher itself (--autoscale "
                f"{role}={bounds}): start it without, to scale by hand"
            )
            await refuse(context, grpc.StatusCode.FAILED_PRECONDITION, reason)
        before = launcher.managed.replicas[role]
        try:
            await asyncio.wait_for(asyncio.shield(launcher.ask(role, replicas)), ANSWER_SECONDS)
        except Superseded as e:
            await refuse(context, grpc.StatusCode.ABORTED, str(e))
        except (Gone, TimeoutError):
            await refuse(
                context, grpc.StatusCode.ABORTED, "the launcher does not answer: ask again"
            )
        self._log.info("scaled", role=role, replicas=replicas, before=before)
        return control_pb2.ScaleResponse(replicas=replicas, replicas_before=before)

    async def expire_leases(self) -> None:
        """For ever: ends the leases of members that are connected and silent, as a frozen process
        is. A launcher hears of all every second, load included."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            for member_id in self._table.expire(time.monotonic()):
                self._log.warning(
                    "member dead", id=member_id, reason=f"silent for {LEASE_SECONDS:.0f} s"
                )
                self._has_begun_draining(member_id)
                self._tell()
            self._places = {
                member_id: place
                for member_id, place in self._places.items()
                if self._table.get(member_id)
            }
            self._drained = {member_id for member_id in self._drained if self._table.get(member_id)}
            if self._launcher:
                self._launcher.tell()

    async def _take_reports(
        self,
        requests: AsyncIterator[control_pb2.JoinRequest],
        news: asyncio.Event,
        launcher: Launcher | None,
    ) -> None:
        try:
            async for request in requests:
                if request.HasField("member") and not self._table.lives(request.member.id):
                    break  # thawed after its lease ended: it must join anew
                self._take(request)
                if launcher:
                    launcher.report(request.managed)
        except (grpc.RpcError, asyncio.CancelledError):
            pass  # the stream broke
        finally:
            news.set()

    async def _admit(
        self, first: control_pb2.JoinRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Refuses a member that the others could not reach where it says it is."""
        place = place_of(context.peer())
        others = [
            (m, self._places[m.id])
            for m in self._table.members()
            if m.state != DEAD and m.id != first.member.id
        ]
        if first.HasField("member"):
            if reason := objection_to(first.member, place, others):
                self._log.warning("refused a member", id=first.member.id, reason=reason)
                await refuse(context, grpc.StatusCode.FAILED_PRECONDITION, reason)
            self._places[first.member.id] = place

    def _leader_of(self, member: control_pb2.Member | None) -> control_pb2.Member | None:
        """A language group drains from its rank 0, which holds the requests."""
        if member is None or member.rank == 0:
            return member
        same = [
            m
            for m in self._table.members()
            if (m.role, m.group, m.rank, m.host) == (member.role, member.group, 0, member.host)
        ]
        return next((m for m in same if m.state != DEAD), member)

    def _others_ready(self, member: control_pb2.Member) -> bool:
        return any(
            m.role == member.role
            and m.rank == 0
            and m.state == READY
            and m.id != member.id
            and m.id not in self._draining
            for m in self._table.members()
        )

    def _forget_launcher(self, launcher: Launcher | None) -> None:
        if launcher:
            launcher.end()
            if self._launcher is launcher:
                self._launcher = None

    def _take(self, request: control_pb2.JoinRequest) -> None:
        member = request.member
        if request.HasField("member") and self._table.report(member, time.monotonic()):
            state = state_name(member.state)
            self._log.debug("member", id=member.id, state=state, address=member.address)
            if member.state == DRAINING:
                self._has_begun_draining(member.id)
            self._tell()

    def _has_begun_draining(self, member_id: str) -> None:
        if begun := self._draining.pop(member_id, None):
            begun.set()

    def _end(self, member_id: str, reason: str) -> None:
        if self._table.end(member_id, time.monotonic()):
            self._log.info("member gone", id=member_id, reason=reason)
            self._has_begun_draining(member_id)
            self._tell()

    def _tell(self) -> None:
        for watcher in self._watchers:
            watcher.set()

    def _response(
        self, watch: bool, member_id: str | None, launcher: Launcher | None
    ) -> control_pb2.JoinResponse:
        return control_pb2.JoinResponse(
            lease_seconds=LEASE_SECONDS,
            members=self._members() if watch else [],
            drain=member_id in self._draining,
            wanted=launcher.wanted if launcher else None,
            drained=self._drained if launcher else None,
        )

    def _members(self) -> list[control_pb2.Member]:
        return [self._myself, *self._table.members()]


async def refuse(context: grpc.aio.ServicerContext, code: grpc.StatusCode, reason: str) -> Never:
    await context.abort(code, reason)
    raise AssertionError("abort raises")
