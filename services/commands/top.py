"""`twinlens top`: the stages and members of a running system, live in a terminal."""

import argparse
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from common.membership import DEAD, READY, state_name
from common.settings import SERVICES
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from services.commands.chat_client import DEFAULT_URL, base_url
from services.commands.client import ClientError, add_grpc_argument, connect, positive, run_command
from services.commands.output import one_line

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

TOP_HELP = """Show the stages and members of a running system and their load, again and again. The
key q or Ctrl-C ends it. If stdout is not a terminal, print them once. The rates come from the
gateway's metrics at --url."""
LIST_SECONDS = 3.0
METRICS_SECONDS = 1.0
LONGEST_ID = 28
RATES = {
    "requests/s": "twinlens_gateway_requests_total",
    "tokens/s": "twinlens_gateway_generation_tokens_total",
}
"""The counters whose changes are shown as rates."""
STATE_STYLES = {"ready": "green", "starting": "yellow", "draining": "yellow", "dead": "red"}


def add_top_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = TOP_HELP
    add_grpc_argument(parser)
    parser.add_argument(
        "--url",
        type=base_url,
        default=DEFAULT_URL,
        metavar="URL",
        help="the gateway's OpenAI base URL, next to which its metrics are (default: %(default)s)",
    )
    parser.add_argument(
        "--interval",
        type=positive,
        default=1.0,
        metavar="SECONDS",
        help="the time between two looks (default: %(default)g)",
    )


def top(arguments: argparse.Namespace) -> int:
    """Show the system until the user ends it. Return the exit status."""
    return run_command(watch if sys.stdout.isatty() else print_once, arguments)


@dataclass
class Look:
    """What was seen of the system at one time."""

    members: Sequence[control_pb2.Member] = ()
    counters: dict[str, float] = field(default_factory=dict)
    """The sum of each counter of RATES, by its name; empty if the metrics cannot be read."""
    at: float = 0.0
    """Monotonic."""


class Watched:
    """A system, with the last two looks at it."""

    def __init__(self, target: str, url: str) -> None:
        self.target = target
        self._metrics_url = url.removesuffix("/v1") + "/metrics"
        self.now = Look()
        self.before = Look()
        self.problem = ""
        """Why the last look failed; empty if it succeeded."""

    def look(self) -> None:
        """Look at the system again.

        Raises
        ------
        ClientError
            If it does not answer. What was seen before stays.
        """
        members = list_members(self.target)
        self.before = self.now
        self.now = Look(members, read_counters(self._metrics_url), time.monotonic())

    def look_again(self) -> None:
        """Look at the system, and remember why that failed if it did."""
        try:
            self.look()
            self.problem = ""
        except ClientError as error:
            self.problem = one_line(str(error))

    def rate(self, counter: str) -> float | None:
        """Return by how much a counter grew in a second; None if that is not known."""
        now = self.now.counters.get(counter)
        before = self.before.counters.get(counter)
        # A gateway that was restarted counts from zero.
        if now is None or before is None or now < before:
            return None
        return (now - before) / (self.now.at - self.before.at)


def list_members(target: str) -> list[control_pb2.Member]:
    with connect(target) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        found = stub.ListMembers(control_pb2.ListMembersRequest(), timeout=LIST_SECONDS)
    return list(found.members)


def read_counters(url: str) -> dict[str, float]:
    """Return the counters of RATES that a page of metrics has; nothing if it cannot be read."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        families = list(text_string_to_metric_families(read_page(url)))
    except (OSError, HTTPException, ValueError):
        return {}
    samples = [sample for family in families for sample in family.samples]
    found: dict[str, float] = {}
    for sample in samples:
        if sample.name in RATES.values():
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def read_page(url: str) -> str:
    """Return the text at a URL, without a proxy that the environment sets.

    Raises OSError, HTTPException or ValueError if there is none.
    """
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    with closing(kind(parts.netloc, timeout=METRICS_SECONDS)) as connection:
        connection.request("GET", parts.path)
        response = connection.getresponse()
        if response.status != HTTPStatus.OK:
            raise ValueError(f"{url} answers with status {response.status}")
        return response.read().decode()


def print_once(arguments: argparse.Namespace) -> None:
    """Print one look, with the rates of one interval. Needs no terminal."""
    from rich.console import Console

    watched = Watched(arguments.grpc, arguments.url)
    watched.look()
    if watched.now.counters:
        time.sleep(arguments.interval)
        watched.look()
    Console().print(picture(watched))


def watch(arguments: argparse.Namespace) -> None:
    """Show the system until q or Ctrl-C. A gateway that goes away later is waited for."""
    from rich.live import Live

    watched = Watched(arguments.grpc, arguments.url)
    watched.look()
    live = Live(screen=True, auto_refresh=False)
    with suppress(KeyboardInterrupt), keys() as is_quit, live:
        live.update(picture(watched), refresh=True)
        while not is_quit(arguments.interval):
            watched.look_again()
            live.update(picture(watched), refresh=True)


@contextmanager
def keys() -> Iterator[Callable[[float], bool]]:
    """Yield a function that waits for some seconds or a key, and returns whether that was q."""
    import termios
    import tty

    def is_quit(seconds: float) -> bool:
        ready, _, _ = select.select(inputs, [], [], seconds)
        if not ready:
            return False
        # Not sys.stdin.read, which would keep the rest of an arrow key's bytes to itself.
        pressed = os.read(sys.stdin.fileno(), 1024)
        return not pressed or b"q" in pressed.lower()

    inputs = [sys.stdin] if sys.stdin.isatty() else []
    if not inputs:
        yield is_quit
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield is_quit
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def picture(watched: Watched) -> "RenderableType":
    """Return everything that is shown."""
    from rich.console import Group
    from rich.text import Text

    rates = [
        f"{'-' if (rate := watched.rate(counter)) is None else f'{rate:,.1f}'} {unit}"
        for unit, counter in RATES.items()
    ]
    head = Text("   ".join([watched.target, time.strftime("%H:%M:%S"), *rates]), style="bold")
    members = watched.now.members
    details = [
        Text(f"{short_id(member.id)}: {one_line(member.detail)}", no_wrap=True, overflow="ellipsis")
        for member in members
        if member.detail
    ]
    tables = (stage_table(members), "", member_table(members), "")
    parts: list[RenderableType] = [head, "", *tables, *details]
    if watched.problem:
        parts.insert(1, Text(f"{watched.problem}; looking again", style="bold red"))
    return Group(*parts)


def stage_table(members: Sequence[control_pb2.Member]) -> "Table":
    """Return one row for each role that has members."""
    table = new_table("stage", "members", "in flight", "queued", "credits", "delay")
    for role in SERVICES:
        own = [m for m in members if m.role == role and m.state != DEAD]
        ready = [m for m in own if m.state == READY and not m.hung]
        if own:
            table.add_row(
                role,
                f"{len(ready)}" if len(ready) == len(own) else f"{len(ready)} of {len(own)} ready",
                *load_cells(
                    sum(m.in_flight for m in own),
                    sum(m.queued for m in own),
                    sum(m.credits for m in ready),
                    min((m.expected_delay for m in ready), default=0.0),
                ),
            )
    return table


def member_table(members: Sequence[control_pb2.Member]) -> "Table":
    """Return one row for each member, in the order in which requests pass them."""
    from rich.text import Text

    table = new_table("member", "state", "in flight", "queued", "credits", "delay")
    order = list(SERVICES)
    known = [member for member in members if member.role in order]
    for member in sorted(known, key=lambda member: (order.index(member.role), member.id)):
        state = "hung" if member.hung else state_name(member.state)
        table.add_row(
            Text(short_id(member.id)),
            Text(state, style=STATE_STYLES.get(state, "red")),
            *load_cells(member.in_flight, member.queued, member.credits, member.expected_delay),
        )
    return table


def load_cells(in_flight: int, queued: int, credits: int, delay: float) -> tuple[str, ...]:
    """Return the cells of a load. Zeros are left out, so that what works stands out."""
    seconds = f"{delay:.{2 if delay < 100 else 0}f} s" if delay else ""
    return (*(str(number or "") for number in (in_flight, queued, credits)), seconds)


def short_id(member_id: str) -> str:
    """Return the end of an id, which is the part that differs."""
    text = one_line(member_id)
    return text if len(text) <= LONGEST_ID else f"…{text[1 - LONGEST_ID :]}"


def new_table(first: str, *names: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True)
    for name in names:
        is_text = name in ("members", "state")
        table.add_column(name, no_wrap=True, justify="left" if is_text else "right")
    return table
