"""Which rank of which group this process is, and how rank 0 starts the other ranks."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace

from common.config import BadSetting, arguments_of
from common.logs import get_logger
from common.membership import new_member_id
from common.process import EXIT_FAILED, EXIT_USAGE, leave
from common.settings import LlmSettings
from common.temporary import temporary_folder


def resolve_rank(settings: LlmSettings) -> LlmSettings:
    """Return the settings with group, rank and rendezvous derived from --ordinal, if given.

    With a rendezvous, something else starts every rank, and the ordinal counts ranks. Without one,
    this process starts the other ranks of its group, and the ordinal counts groups.

    Raises
    ------
    BadSetting
    """
    if not settings.ordinal:
        return settings
    if not (found := re.search(r"\d+$", settings.ordinal)):
        raise BadSetting(
            f"--ordinal {settings.ordinal!r}: give a number, or a name that ends in one"
        )
    group, rank = divmod(int(found[0]), settings.tp if settings.rendezvous else 1)
    leader = int(found[0]) - rank
    rendezvous = settings.rendezvous.replace("{leader}", str(leader))
    return replace(settings, group=f"{settings.group}-{group}", rank=rank, rendezvous=rendezvous)


def num_ranks_here(settings: LlmSettings) -> int:
    """Return how many ranks of one group share this host.

    Ranks that meet over TCP are assumed to have a host each.
    """
    return 1 if settings.rendezvous.startswith("tcp://") else settings.tp


@contextlib.contextmanager
def other_ranks(settings: LlmSettings) -> Iterator[LlmSettings]:
    """Start ranks 1 and up on this host, unless a rendezvous says that something else does.

    They end with the block. A rank that dies ends this process, too.
    """
    if settings.tp == 1 or settings.rendezvous:
        yield settings
        return
    with temporary_folder("twinlens-llm-") as folder:
        # Several groups may have the same name, and none may take another's ranks for its own.
        group = settings.group if settings.ordinal else new_member_id(settings.group)
        settings = replace(settings, rendezvous=f"file://{folder}/meet", group=group)
        ended = threading.Event()
        ranks = [subprocess.Popen(command_of(settings, rank)) for rank in range(1, settings.tp)]
        for process in ranks:
            threading.Thread(target=watch, args=(process, ended), daemon=True).start()
        try:
            yield settings
        finally:
            ended.set()
            for process in ranks:
                process.kill()
                process.wait()


def command_of(settings: LlmSettings, rank: int) -> list[str]:
    own = replace(
        settings,
        rank=rank,
        ordinal="",
        listen=listen_beside(settings.listen, rank),
        die_with_parent=os.getpid(),
        health_port=0,
    )
    return [sys.executable, "-m", "services.llm", *arguments_of(asdict(own))]


def listen_beside(listen: str, rank: int) -> str:
    """Return the address of a separate inbox for the rank, on the same interface."""
    return f"{listen.rpartition(':')[0]}:*" if listen.startswith("tcp://") else f"{listen}.{rank}"


def watch(process: subprocess.Popen[bytes], ended: threading.Event) -> None:
    """End this process if a rank ends: the work loop might wait for that rank for ever."""
    status = process.wait()
    if not ended.is_set():
        get_logger().error("a rank of the group ended, so the group ends", status=status)
        leave(EXIT_USAGE if status == EXIT_USAGE else EXIT_FAILED)
