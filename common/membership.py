"""The stream to the controller, by which a process registers and learns who else is there.

`common/member.py` says how this relates to `Member` and `MembershipTable`.
"""

import math
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator

import grpc

from common.errors import shorten
from common.logs import get_logger
from common.process import EXIT_USAGE, leave
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc

REPORT_SECONDS = 0.8
"""`twinlens status` promises figures at most a second old. A report costs both processes together
about a millisecond."""
FIRST_RETRY_SECONDS = 0.2
LAST_RETRY_SECONDS = 2.0

REFUSED = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)
"""The codes with which the controller refuses a member that need not try again."""
MAX_DETAIL_CHARS = 200
MAX_DELAY_SECONDS = 1e9
"""The longest expected delay that a member reports."""
MAX_LIST_BYTES = 32 * 2**20
"""The largest message of the controller: 4,096 members of 2 KiB, and room for more."""
CHANNEL_OPTIONS = (
    # A proxy that the environment sets is not meant for members.
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", MAX_LIST_BYTES),
)

STARTING = control_pb2.MEMBER_STATE_STARTING
READY = control_pb2.MEMBER_STATE_READY
DRAINING = control_pb2.MEMBER_STATE_DRAINING
DEAD = control_pb2.MEMBER_STATE_DEAD
STANDBY = control_pb2.MEMBER_STATE_STANDBY


def state_name(state: "control_pb2.MemberState.ValueType") -> str:
    """Return the name of a member's state as users see it, such as `ready`."""
    if state not in control_pb2.MemberState.values():
        return f"state {state}"  # of another version
    return control_pb2.MemberState.Name(state).removeprefix("MEMBER_STATE_").lower()


def new_member_id(name: str) -> str:
    """Return the name with a random suffix.

    So a restarted process is another member, and nothing that was meant for its former life reaches
    it.
    """
    return f"{name}-{secrets.token_hex(3)}"


class Membership:
    """Keeps this process registered with the controller, from a thread of its own.

    The controller may go away and come back at any time. A member that it refuses, for example
    because others cannot reach its address, logs the reason and exits.
    """

    def __init__(
        self,
        controller: str,
        member: control_pb2.Member | None,
        load: Callable[[], tuple[int, int]],
        *,
        on_members: Callable[[list[control_pb2.Member]], None] | None = None,
        on_drain: Callable[[], None] | None = None,
        managed: Callable[[], control_pb2.Managed] | None = None,
        on_response: Callable[[control_pb2.JoinResponse], None] | None = None,
        is_hung: Callable[[], bool] = lambda: False,
        expected_delay: Callable[[], float] = lambda: 0.0,
        credits: Callable[[], int] = lambda: 0,
        key: str = "",
    ) -> None:
        """Start reporting. All functions are called on the thread of this object.

        Parameters
        ----------
        controller
            is its gRPC address.
        member
            is the entry to report, which `set_state` changes. None only listens.
        load
            returns (in_flight, queued).
        on_members
            is called with all members that are alive, after every change.
        on_drain
            is called when the controller asks the member to drain, possibly several times.
        managed
            returns what a launcher manages.
        on_response
            is called with every message of the controller.
        is_hung, expected_delay, credits
            return the fields of the entry with these names.
        key
            is what a launcher must know. A member has a key of its own, which nobody else knows.
        """
        if member:
            member.pid = os.getpid()
            member.host = socket.gethostname()
        self._controller = controller
        self._member = member
        self._load = load
        self._on_members = on_members
        self._on_drain = on_drain
        self._managed = managed
        self._on_response = on_response
        self._is_hung = is_hung
        self._expected_delay = expected_delay
        self._credits = credits
        self._key = key or secrets.token_hex()
        self._changed = threading.Event()
        self._stopped = False
        self._log = get_logger()
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)
        self._thread.start()

    def set_state(
        self, state: "control_pb2.MemberState.ValueType", detail: str = "", max_model_len: int = 0
    ) -> None:
        """Change the state of the entry, and report it at once."""
        assert self._member is not None
        self._member.state = state
        self._member.detail = shorten(printable(detail), MAX_DETAIL_CHARS)
        self._member.max_model_len = max_model_len
        self._changed.set()

    def report(self) -> None:
        """Report at once, because what `managed` returns has changed."""
        self._changed.set()

    def leave(self) -> None:
        """End the stream, which tells the controller at once that this member has left."""
        self._stopped = True
        self._changed.set()

    def _run(self) -> None:
        retry = FIRST_RETRY_SECONDS
        while not self._stopped:
            try:
                for response in self._join():
                    retry = FIRST_RETRY_SECONDS
                    self._on_join_response(response)
            except grpc.RpcError as e:
                self._on_error(e)
            except Exception:  # noqa: BLE001 - the outermost loop; it must go on reporting
                self._log.exception("the controller's message was not handled")
            self._changed.wait(retry)
            retry = min(2 * retry, LAST_RETRY_SECONDS)

    def _join(self) -> Iterator[control_pb2.JoinResponse]:
        """Yield the messages of the controller until the stream ends."""
        with grpc.insecure_channel(self._controller, options=CHANNEL_OPTIONS) as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            yield from stub.Join(self._reports(), wait_for_ready=False)

    def _on_error(self, error: grpc.RpcError) -> None:
        if error.code() in REFUSED:
            self._log.error("the controller refuses this member", reason=error.details())
            leave(EXIT_USAGE)
        self._log.debug(
            "the controller cannot be reached", controller=self._controller, code=str(error.code())
        )

    def _reports(self) -> Iterator[control_pb2.JoinRequest]:
        """Yield a report every REPORT_SECONDS, and at once when something changed."""
        watches = self._on_members is not None or self._on_response is not None
        while not self._stopped:
            self._changed.clear()
            if self._member:
                self._member.in_flight, self._member.queued = self._load()
                self._member.hung = self._is_hung()
                self._member.expected_delay = reportable_delay(self._expected_delay())
                is_ready = self._member.state == READY
                self._member.credits = self._credits() if is_ready else 0
            managed = self._managed() if self._managed else None
            yield control_pb2.JoinRequest(
                member=self._member, watch=watches, managed=managed, key=self._key
            )
            self._changed.wait(REPORT_SECONDS)

    def _on_join_response(self, response: control_pb2.JoinResponse) -> None:
        if self._on_members:
            self._on_members([member for member in response.members if member.state != DEAD])
        if response.drain and self._on_drain:
            self._on_drain()
        if self._on_response:
            self._on_response(response)


def reportable_delay(seconds: float) -> float:
    """Return an expected delay as the controller accepts it, whatever was computed."""
    return min(max(seconds, 0.0), MAX_DELAY_SECONDS) if not math.isnan(seconds) else 0.0


def printable(text: str) -> str:
    """Return a text with spaces in the place of line breaks and control characters."""
    return "".join(character if character.isprintable() else " " for character in text)
