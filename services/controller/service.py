"""ControlService over gRPC: a membership table fed by one stream a member."""

import asyncio
import time
from collections.abc import AsyncIterator

import grpc

from common.logs import get_logger
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from services.controller.membership_table import LEASE_SECONDS, MembershipTable

TICK_SECONDS = 1.0


class ControlServicer(control_pb2_grpc.ControlServiceServicer):
    def __init__(self, myself: control_pb2.Member) -> None:
        self._table, self._myself = MembershipTable(), myself
        self._watchers: set[asyncio.Event] = set()
        self._streams: dict[str, asyncio.Event] = {}
        self._log = get_logger()

    async def Join(
        self, requests: AsyncIterator[control_pb2.JoinRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.JoinResponse]:
        first = await anext(requests, None)
        if first is None:
            return
        member_id = first.member.id if first.HasField("member") else None
        news = asyncio.Event()
        self._take(first)
        if member_id:
            self._streams[member_id] = news
        reports = asyncio.create_task(self._take_reports(requests, news))
        if first.watch:
            self._watchers.add(news)
        try:
            yield self._response(first.watch)
            while True:
                await news.wait()
                news.clear()
                if reports.done() or (member_id and not self._table.lives(member_id)):
                    return
                yield self._response(first.watch)
        finally:
            reports.cancel()
            self._watchers.discard(news)
            # A member may have joined anew before the break of its old stream is seen.
            if member_id and self._streams.get(member_id) is news:
                del self._streams[member_id]
                self._end(member_id, "it left")

    async def ListMembers(
        self, request: control_pb2.ListMembersRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ListMembersResponse:
        return control_pb2.ListMembersResponse(members=self._members())

    async def expire_leases(self) -> None:
        """For ever: ends the leases of members that are connected and silent, as a frozen process is."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            for member_id in self._table.expire(time.monotonic()):
                self._log.warning("member dead", id=member_id, reason=f"silent for {LEASE_SECONDS:.0f} s")
                self._tell()

    async def _take_reports(self, requests: AsyncIterator[control_pb2.JoinRequest], news: asyncio.Event) -> None:
        try:
            async for request in requests:
                if request.HasField("member") and not self._table.lives(request.member.id):
                    break  # thawed after its lease ended: it must join anew
                self._take(request)
        except (grpc.RpcError, asyncio.CancelledError):
            pass  # the stream broke
        finally:
            news.set()

    def _take(self, request: control_pb2.JoinRequest) -> None:
        member = request.member
        if request.HasField("member") and self._table.report(member, time.monotonic()):
            state = control_pb2.MemberState.Name(member.state).removeprefix("MEMBER_STATE_").lower()
            self._log.debug("member", id=member.id, state=state, address=member.address)
            self._tell()

    def _end(self, member_id: str, reason: str) -> None:
        if self._table.end(member_id, time.monotonic()):
            self._log.info("member gone", id=member_id, reason=reason)
            self._tell()

    def _tell(self) -> None:
        for watcher in self._watchers:
            watcher.set()

    def _response(self, watch: bool) -> control_pb2.JoinResponse:
        return control_pb2.JoinResponse(lease_seconds=LEASE_SECONDS, members=self._members() if watch else [])

    def _members(self) -> list[control_pb2.Member]:
        return [self._myself, *self._table.members()]
