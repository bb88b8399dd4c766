"""`twinlens status`, `scale` and `drain`: who is a member of a running system, and how many are to
be."""

import argparse
import json
from typing import Any

from common.settings import MAX_REPLICAS, SCALABLE_ROLES
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from services.commands.generate import (
    add_common_arguments,
    as_dict,
    connected,
    guarded,
    whole_number,
)

TIMEOUT = 15.0
COLUMNS = ("role", "id", "state", "pid", "in_flight", "queued", "detail")

SCALE_HELP = """Change how many replicas of a role `twinlens serve` keeps. New replicas take work as
soon as they are ready. If there are too many, those with the least work finish what they hold and
leave. The command returns once the launcher has accepted the change."""
DRAIN_HELP = """Take one member out. It takes nothing new, finishes what it holds and leaves;
`twinlens serve` then keeps one replica fewer of its role. The last ready member of a role is
refused."""


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)


def add_scale_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = SCALE_HELP
    parser.add_argument("role", choices=SCALABLE_ROLES, help="llm counts language groups")
    parser.add_argument(
        "replicas", type=whole_number(1, MAX_REPLICAS), help="how many there are to be"
    )
    add_common_arguments(parser)


def add_drain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DRAIN_HELP
    parser.add_argument("id", help="the member's id, as `twinlens status` shows it")
    add_common_arguments(parser)


def status(arguments: argparse.Namespace) -> int:
    return guarded(print_members, arguments)


def scale(arguments: argparse.Namespace) -> int:
    return guarded(scale_role, arguments)


def drain(arguments: argparse.Namespace) -> int:
    return guarded(drain_member, arguments)


def print_members(arguments: argparse.Namespace) -> None:
    with connected(arguments.grpc) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        found = stub.ListMembers(control_pb2.ListMembersRequest(), timeout=TIMEOUT)
    members = [as_dict(member) | {"state": state_name(member)} for member in found.members]
    print(
        json.dumps({"members": members}, ensure_ascii=False) if arguments.json else table(members)
    )


def state_name(member: control_pb2.Member) -> str:
    return control_pb2.MemberState.Name(member.state).removeprefix("MEMBER_STATE_").lower()


def table(members: list[dict[str, Any]]) -> str:
    rows = [
        [name.replace("_", " ") for name in COLUMNS],
        *([str(member[name]) for name in COLUMNS] for member in members),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def scale_role(arguments: argparse.Namespace) -> None:
    request = control_pb2.ScaleRequest(role=arguments.role, replicas=arguments.replicas)
    with connected(arguments.grpc) as channel:
        done = control_pb2_grpc.ControlServiceStub(channel).Scale(request, timeout=TIMEOUT)
    words = f"{arguments.role}: {done.replicas} wanted, {done.replicas_before} before"
    print(json.dumps({"role": arguments.role} | as_dict(done)) if arguments.json else words)


def drain_member(arguments: argparse.Namespace) -> None:
    request = control_pb2.DrainRequest(member_id=arguments.id)
    with connected(arguments.grpc) as channel:
        member = control_pb2_grpc.ControlServiceStub(channel).Drain(request, timeout=TIMEOUT).member
    words = (
        f"{member.id}: {state_name(member)}, {member.in_flight} in flight, {member.queued} queued"
    )
    print(
        json.dumps(as_dict(member) | {"state": state_name(member)}, ensure_ascii=False)
        if arguments.json
        else words
    )
