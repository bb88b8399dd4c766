"""The sandboxes of a preprocess service, as its work loop uses them.

The loop starts tasks and never waits for them. A thread receives the answers and posts them to the
loop, which passes them to `handle`. Everything else happens on the loop's thread.

Tasks of equal priority take turns by what they are expected to cost: cheap ones first, but a task
that waits overtakes newer ones in time. Costly tasks never occupy the last sandboxes, so a cheap
one that arrives meanwhile starts at once.
"""

import mmap
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from common.checkpoint import BadCheckpoint
from common.logs import get_logger
from common.wire import Buffer
from services.preprocess.chat_template import TOO_COSTLY as COSTLY_TEMPLATE
from services.preprocess.images import TOO_COSTLY as COSTLY_IMAGE
from services.preprocess.sandbox import meter
from services.preprocess.sandbox.jobs import (
    MAX_MESSAGE_BYTES,
    BadAnswer,
    Job,
    Loaded,
    Refused,
    Result,
    ResultMessage,
    Setup,
    Spare,
    Spares,
    Spell,
    map_blobs,
    receive,
    send_job,
    split,
    unpack,
)
from services.preprocess.sandbox.meter import MARK, read_mark
from services.preprocess.videos import TOO_COSTLY as COSTLY_VIDEO

PROGRAM = ["services.preprocess.sandbox.child"]
"""What `python -m` runs, with its first arguments."""
LOADING_SECONDS = 300.0
LIGHT_SECONDS = 0.1
"""A task that is expected to take longer, or has taken OVERDUE_SECONDS, is costly."""
TINY_SECONDS = 0.005
OVERDUE_SECONDS = 0.3
AGING = 10.0
"""A task waits at most for newer tasks that arrive within this many times its cost."""
MAX_STARTS = 3
"""How often a task is started if sandboxes die before they begin it."""
ENVIRONMENT = {
    # A sandbox has one thread.
    "TOKENIZERS_PARALLELISM": "false",
    "OPENBLAS_NUM_THREADS": "1",
    # What pixels free is used again, not given back: the kernel takes 2 us for each new page. Eight
    # images of 224x224 take 12.6 ms instead of 17.9.
    "MALLOC_MMAP_THRESHOLD_": str(8 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TOP_PAD_": str(8 * 2**20),
}


@dataclass(slots=True, eq=False)
class Task:
    """A job that a sandbox must do for a request."""

    job: Job
    blobs: Sequence[Buffer]
    seconds: float
    """The CPU time that it is expected to take."""
    priority: int = 0
    """Tasks with lower values come first."""
    queued: float = 0.0
    num_starts: int = 0


@dataclass(slots=True, eq=False)
class Sandbox:
    """A connection to a sandbox."""

    connection: socket.socket
    mark: mmap.mmap
    task: Task | None = None
    spare: Spare | None = None
    started: float = 0.0


@dataclass(frozen=True, slots=True)
class Answered:
    """A message of a sandbox, as the thread posts it; None if the sandbox is dead."""

    sandbox: Sandbox
    message: tuple[bytes, list[int]] | None


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a task."""

    task: Task
    result: Result
    blobs: list[memoryview] = field(default_factory=list)


class Tasks(Protocol):
    """What the work loop needs of the sandboxes."""

    @property
    def num_waiting(self) -> int:
        """The number of tasks that no sandbox has begun."""
        ...

    def start(self, task: Task) -> None:
        """Have the task done when its turn comes."""
        ...

    def cancel(self, task: Task) -> None:
        """Forget a task that nobody waits for any more."""
        ...

    def handle(self, event: object) -> Finished | None:
        """Handle what was posted. Returns the task that ended, if one did."""
        ...

    def look(self) -> None:
        """Make room for waiting tasks if a running one takes unexpectedly long."""
        ...


class Sandboxes:
    """Implements `Tasks`."""

    def __init__(
        self, setup: Setup, size: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the program that forks sandboxes. `size` costly tasks may run at once."""
        self._setup = setup
        self._size = size
        self._clock = clock
        self._log = get_logger()
        self._waiting: list[Task] = []
        self._spares = Spares()
        self._sandboxes: list[Sandbox] = []
        self._by_descriptor: dict[int, Sandbox] = {}
        self._epoll = select.epoll()
        self._end = os.eventfd(0)
        self._epoll.register(self._end, select.EPOLLIN)
        self._thread: threading.Thread | None = None
        self._control, self._program = self._start_program()

    def _start_program(self) -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            setup = msgspec.json.encode(self._setup).decode()
            arguments = [str(theirs.fileno()), str(os.getpid()), setup]
            program = subprocess.Popen(
                [sys.executable, "-m", *PROGRAM, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | ENVIRONMENT,
            )
        return ours, program

    def wait_until_loaded(self) -> None:
        """Wait until the model's files are loaded.

        Raises
        ------
        BadCheckpoint
            if one is damaged or missing, or takes too much time or memory.
        """
        self._control.settimeout(LOADING_SECONDS)
        try:
            data = self._control.recv(MAX_MESSAGE_BYTES)
        except OSError:
            data = b""
        fault = "the vocabulary or the chat template takes too much time or memory to load"
        if data:
            fault = msgspec.msgpack.decode(data, type=Loaded).fault
        if fault:
            raise BadCheckpoint(fault)

    def begin(self, post: Callable[[object], None]) -> None:
        """Start to receive answers. `post` is called with each on another thread."""
        self._thread = threading.Thread(
            target=self._receive, args=(post,), name="sandboxes", daemon=True
        )
        self._thread.start()
        self._fork()

    def close(self) -> None:
        """End all sandboxes."""
        self._program.kill()
        self._program.wait()
        os.eventfd_write(self._end, 1)
        if self._thread:
            self._thread.join()
        for connection in [self._control, *(s.connection for s in self._sandboxes)]:
            connection.close()
        self._epoll.close()
        os.close(self._end)

    def _receive(self, post: Callable[[object], None]) -> None:
        while True:
            for descriptor, _ in self._epoll.poll():
                if descriptor == self._end:
                    return
                sandbox = self._by_descriptor[descriptor]
                message = receive(sandbox.connection)
                if message is None:
                    self._epoll.unregister(descriptor)
                post(Answered(sandbox, message))

    # Tasks

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def start(self, task: Task) -> None:
        task.queued = self._clock()
        self._waiting.append(task)
        self._assign()

    def cancel(self, task: Task) -> None:
        if task in self._waiting:
            self._waiting.remove(task)

    def look(self) -> None:
        if self._waiting:
            self._assign()

    def handle(self, event: object) -> Finished | None:
        assert isinstance(event, Answered)
        sandbox = event.sandbox
        task = sandbox.task
        spare = sandbox.spare
        sandbox.task = None
        sandbox.spare = None
        if event.message is None:
            finished = self._bury(sandbox, task)
        else:
            finished = Finished(task, *self._result_of(*event.message, spare)) if task else None
        self._assign()
        return finished

    def _result_of(
        self, data: bytes, descriptors: list[int], spare: Spare | None
    ) -> tuple[Result, list[memoryview]]:
        try:
            message = unpack(data, ResultMessage)
            sizes = message.blob_sizes
            if spare and message.in_spare:
                return message.result, split(spare.whole.data, sizes)
            return message.result, map_blobs(next(iter(descriptors), -1), sizes)
        except BadAnswer as e:
            self._log.error("a sandbox cannot answer", reason=str(e))
            return Refused("Internal", "the request could not be prepared"), []

    def _bury(self, sandbox: Sandbox, task: Task | None) -> Finished | None:
        """Remove a dead sandbox. Its task fails, unless it had not begun."""
        self._sandboxes.remove(sandbox)
        del self._by_descriptor[sandbox.connection.fileno()]
        sandbox.connection.close()
        if task is None:
            return None
        unit = read_mark(sandbox.mark)
        self._log.warning("a sandbox ended", unit=unit)
        # All end with the program, whatever they are busy with.
        if self._program.poll() is None and (refused := verdict(task.job, unit)):
            return Finished(task, refused)
        if task.num_starts >= MAX_STARTS:
            error = f"the request could not be prepared in {MAX_STARTS} attempts"
            return Finished(task, Refused("Internal", error))
        self._waiting.append(task)
        return None

    # Sandboxes

    def _assign(self) -> None:
        """Give waiting tasks to sandboxes, as many as may run now."""
        self._waiting.sort(key=lambda task: (task.priority, task.queued + AGING * task.seconds))
        for task in list(self._waiting):
            if not self._may_start(task):
                continue
            sandbox = next((s for s in self._sandboxes if s.task is None), None) or self._fork()
            if sandbox is None or not self._send(sandbox, task):
                return
            self._waiting.remove(task)

    def _may_start(self, task: Task) -> bool:
        """Whether a task may start now, or must leave the free sandboxes to cheaper ones.

        Of the cheap tasks, one more than of the costly ones may run at once, and then another one
        if it is tiny.
        """
        now = self._clock()
        running = [s for s in self._sandboxes if s.task]
        num_costly = sum(is_costly(s, now) for s in running)
        num_cheap = len(running) - num_costly
        if task.seconds > LIGHT_SECONDS:
            return num_costly < self._size
        is_tiny = task.seconds <= TINY_SECONDS
        return num_cheap <= self._size + is_tiny and len(running) <= 2 * self._size + is_tiny

    def _send(self, sandbox: Sandbox, task: Task) -> bool:
        try:
            spare = self._spares.take() if getattr(task.job, "kinds", ()) else None
            descriptor = spare.descriptor if spare else -1
            send_job(sandbox.connection, task.job, task.blobs, descriptor)
        except OSError as e:  # it has just died, or this process lacks memory or descriptors
            self._log.warning("a sandbox cannot be given work", reason=str(e))
            return False
        sandbox.task = task
        sandbox.spare = spare
        sandbox.started = self._clock()
        task.num_starts += 1
        return True

    def _fork(self) -> Sandbox | None:
        """Return a new sandbox, or None if there cannot be one now."""
        if self._program.poll() is not None:
            self._log.error("the program of the sandboxes ended", status=self._program.returncode)
            self._control.close()
            self._control, self._program = self._start_program()
        try:
            return self._connect()
        except OSError as e:
            self._log.warning("no further sandbox", reason=str(e))
            return None

    def _connect(self) -> Sandbox:
        memory = os.memfd_create("twinlens-mark", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, MARK.size)
            mark = mmap.mmap(memory, MARK.size)
            MARK.pack_into(mark, 0, meter.NOTHING)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                socket.send_fds(self._control, [b"f"], [theirs.fileno(), memory])
        finally:
            os.close(memory)
        sandbox = Sandbox(ours, mark)
        self._sandboxes.append(sandbox)
        self._by_descriptor[ours.fileno()] = sandbox
        self._epoll.register(ours.fileno(), select.EPOLLIN)
        return sandbox


def is_costly(sandbox: Sandbox, now: float) -> bool:
    """Whether a sandbox is busy with a task that is costly, or turned out to be."""
    assert sandbox.task is not None
    return sandbox.task.seconds > LIGHT_SECONDS or now - sandbox.started > OVERDUE_SECONDS


def verdict(job: Job, unit: int) -> Refused | None:
    """Return what to tell the client whose job ended a sandbox at this unit; None: nothing.

    It was killed at a limit, or a library crashed.
    """
    match unit:
        case meter.NOTHING:
            return None
        case meter.TEMPLATE:
            return Refused("InvalidRequest", COSTLY_TEMPLATE)
        case meter.TOKENIZER:
            return Refused("InvalidRequest", "the prompt takes too long to tokenize: shorten it")
        case meter.GUIDE:
            text = "the response format takes too much time or memory to compile: make it simpler"
            return Refused("InvalidRequest", text)
    assert not isinstance(job, Spell)
    first = getattr(job, "first", 0)
    kind = job.kinds[unit - first]
    reason = {"image": COSTLY_IMAGE, "video": COSTLY_VIDEO}[kind]
    return Refused("UnreadableImage", f"{kind} {unit}: {reason}", unit)
