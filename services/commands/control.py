"""`twinlens status`, `scale` and `drain`: show and change the members of a running system."""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from common.membership import state_name
from common.settings import MAX_REPLICAS, SCALABLE_ROLES
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from services.commands.client import (
    add_client_arguments,
    as_dict,
    connect,
    run_command,
    whole_number,
)
from services.commands.output import json_line, one_line

TIMEOUT = 15.0
COLUMNS = ("role", "id", "state", "pid", "in_flight", "queued", "detail")
ID = COLUMNS.index("id")
LEAST_ID = 8
"""The columns that an id gets at least."""
GAP = "  "
INDENT: Any = {"initial_indent": "    ", "subsequent_indent": "    "}

SCALE_HELP = """Change how many replicas of a role `twinlens serve` keeps. New replicas take work as
soon as they are ready. If there are too many, those with the least work finish what they hold and
leave. The command returns once the launcher has accepted the change."""
DRAIN_HELP = """Take one member out. It accepts nothing new, finishes what it holds and leaves;
`twinlens serve` then keeps one replica fewer of its role. The last ready member of a role cannot be
drained."""


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)


def add_scale_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = SCALE_HELP
    parser.add_argument("role", choices=SCALABLE_ROLES, help="llm counts language groups")
    parser.add_argument(
        "replicas", type=whole_number(1, MAX_REPLICAS), help="how many replicas should run"
    )
    add_client_arguments(parser)


def add_drain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DRAIN_HELP
    parser.add_argument("id", help="the member's id, as `twinlens status` shows it")
    add_client_arguments(parser)


def status(arguments: argparse.Namespace) -> int:
    """Print every member of the system. Return the exit status."""
    return run_command(print_members, arguments)


def scale(arguments: argparse.Namespace) -> int:
    """Change the number of replicas of a role. Return the exit status."""
    return run_command(scale_role, arguments)


def drain(arguments: argparse.Namespace) -> int:
    """Drain one member. Return the exit status."""
    return run_command(drain_member, arguments)


def print_members(arguments: argparse.Namespace) -> None:
    with connect(arguments.grpc) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        found = stub.ListMembers(control_pb2.ListMembersRequest(), timeout=TIMEOUT)
    members = [describe(member) for member in found.members]
    if arguments.json:
        print(json_line({"members": members}))
        return
    print(table(members, terminal_width()))
    if unused := unused_roles(members):
        print(f"\nThe served model needs no {' and no '.join(unused)}.")


def unused_roles(members: list[dict[str, Any]]) -> list[str]:
    """Return the roles that requests to the served model do not pass, as preprocess reports it."""
    stages = {role for member in members for role in member["stages"]}
    return [role for role in SCALABLE_ROLES if stages and role not in stages]


def describe(member: control_pb2.Member) -> dict[str, Any]:
    """Return a member's fields, with the state by its short name."""
    return as_dict(member) | {"state": state_name(member.state)}


def terminal_width() -> int | None:
    """Return the columns of the terminal that stdout is; None if it is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(members: list[dict[str, Any]], width: int | None = None) -> str:
    """Return the members as text in aligned columns.

    Without a width, each is one line. With one, no line is longer: ids are wrapped if they must be,
    and each detail follows on lines of its own.
    """
    names = COLUMNS if width is None else COLUMNS[:-1]
    rows = [
        [name.replace("_", " ") for name in names],
        *([one_line(str(member[name])) for name in names] for member in members),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if width is None:
        return "\n".join(aligned(row, widths) for row in rows)
    others = sum(widths) - widths[ID] + len(GAP) * (len(widths) - 1)
    widths[ID] = min(widths[ID], max(LEAST_ID, width - others))
    details = ["", *(one_line(member["detail"]) for member in members)]
    lines: list[str] = []
    for row, detail in zip(rows, details, strict=True):
        lines += wrapped_row(row, widths)
        lines += textwrap.wrap(detail, max(width, LEAST_ID), **INDENT)
    return "\n".join(lines)


def wrapped_row(row: list[str], widths: list[int]) -> Iterator[str]:
    """Yield the lines of a row whose id may be longer than its column."""
    first, *rest = textwrap.wrap(row[ID], widths[ID]) or [""]
    yield aligned([*row[:ID], first, *row[ID + 1 :]], widths)
    for part in rest:
        yield aligned(["", part], widths[: ID + 1])


def aligned(cells: list[str], widths: list[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return GAP.join(padded).rstrip()


def scale_role(arguments: argparse.Namespace) -> None:
    request = control_pb2.ScaleRequest(role=arguments.role, replicas=arguments.replicas)
    with connect(arguments.grpc) as channel:
        done = control_pb2_grpc.ControlServiceStub(channel).Scale(request, timeout=TIMEOUT)
    text = f"{arguments.role}: {done.replicas} wanted, {done.replicas_before} before"
    print(json_line({"role": arguments.role} | as_dict(done)) if arguments.json else text)


def drain_member(arguments: argparse.Namespace) -> None:
    request = control_pb2.DrainRequest(member_id=arguments.id)
    with connect(arguments.grpc) as channel:
        member = control_pb2_grpc.ControlServiceStub(channel).Drain(request, timeout=TIMEOUT).member
    state = state_name(member.state)
    text = f"{member.id}: {state}, {member.in_flight} in flight, {member.queued} queued"
    print(json_line(describe(member)) if arguments.json else one_line(text))
