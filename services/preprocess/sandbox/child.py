"""The program that loads the model's files once, and forks sandboxes of itself.

    python -m services.preprocess.sandbox.child SOCKET PARENT SETUP

It has one thread and no connections, so a fork of it is sound and takes milliseconds. It ends with
the process that started it, and its sandboxes end with it.
"""

import gc
import logging
import mmap
import os
import resource
import signal
import socket
import sys
from contextlib import suppress

import msgspec

from common.checkpoint import BadCheckpoint, open_checkpoint
from common.process import die_with_parent
from services.preprocess import families
from services.preprocess.families import ItemLimits
from services.preprocess.preprocessor import Preprocessor
from services.preprocess.sandbox.jobs import (
    JobMessage,
    Loaded,
    Setup,
    map_blobs,
    receive,
    send_result,
    unpack,
)
from services.preprocess.sandbox.meter import CPU_SECONDS, MARK, Meter, limit_memory
from services.preprocess.sandbox.work import Workbench
from services.preprocess.videos import VideoLimits

LOADING_CPU_SECONDS = 60.0
STDERR = 2
MOST_KILLABLE = "1000"
"""The oom_score_adj of a sandbox. If the machine runs out of memory, sandboxes go first."""


def main(control: socket.socket, setup: Setup) -> None:
    """Load, then fork a sandbox for each socket that arrives."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides when they end
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no sandbox becomes a zombie
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    silence_libraries()
    signal.setitimer(signal.ITIMER_PROF, LOADING_CPU_SECONDS)
    try:
        workbench = load(setup)
    except ValueError as e:
        control.send(msgspec.msgpack.encode(Loaded(fault=str(e))))
        return
    signal.setitimer(signal.ITIMER_PROF, 0.0)
    gc.freeze()  # a collection in a sandbox would copy all that it shares with this process
    control.send(msgspec.msgpack.encode(Loaded()))
    while (order := socket.recv_fds(control, 1, 2))[0]:
        serve_in_fork(workbench, control, *order[1])


def silence_libraries() -> None:
    """Let only Python write errors: libtiff prints what is wrong with a file, past all logs."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)
    sys.stderr = os.fdopen(os.dup(STDERR), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDERR)
    os.close(nowhere)


def load(setup: Setup) -> Workbench:
    checkpoint = open_checkpoint(setup.model)
    limits = ItemLimits(setup.min_pixels, setup.max_pixels, setup.resizes_oversized)
    rules = families.load(checkpoint, limits)
    preprocessor = Preprocessor(
        checkpoint,
        rules,
        setup.max_model_len,
        setup.known_as,
        families.load_video(checkpoint, limits),
        VideoLimits(setup.video_fps, setup.max_frames),
        setup.image_formats,
    )
    workbench = Workbench(preprocessor)
    if rules.chat_prompt is not None:
        return workbench
    if preprocessor.placeholder_id is not None and preprocessor.placeholder is None:
        raise BadCheckpoint(f"the vocabulary has no token {preprocessor.placeholder_id} for images")
    preprocessor.vocabulary.prepare_marked()
    # The template comes from elsewhere, and constant expressions in it are computed at once.
    limit_memory()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    _ = preprocessor.template
    return workbench


def serve_in_fork(workbench: Workbench, control: socket.socket, connection: int, mark: int) -> None:
    """Fork a sandbox that does the jobs which arrive at the socket `connection`."""
    me = os.getpid()
    if os.fork():
        os.close(connection)
        os.close(mark)
        return
    try:
        control.close()
        die_with_parent(me)
        with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
            file.write(MOST_KILLABLE)
        serve(workbench, socket.socket(fileno=connection), Meter(mmap.mmap(mark, MARK.size)))
    finally:
        os._exit(0)


def serve(workbench: Workbench, connection: socket.socket, meter: Meter) -> None:
    """Do jobs until the other end is closed."""
    limit_memory()
    while message := receive(connection):
        data, (memory, *spare) = message
        order = unpack(data, JobMessage)
        result, blobs = workbench.do(order.job, map_blobs(memory, order.blob_sizes), meter)
        meter.end()
        send_result(connection, result, blobs, *spare)
        # Otherwise the memory of a job would be there until the next one.
        del order, result, blobs


if __name__ == "__main__":
    socket_fd, parent, given = sys.argv[1:]
    die_with_parent(int(parent))
    main(socket.socket(fileno=int(socket_fd)), msgspec.json.decode(given, type=Setup))
