"""Who a rank is by its ordinal, and the ranks that rank 0 starts beside itself."""

import argparse
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common.config import BadSetting, load
from common.process import EXIT_FAILED, EXIT_USAGE
from common.settings import LlmSettings
from services.llm import grouping
from services.llm.grouping import command_of, num_ranks_here, other_ranks, resolve_rank, watch

MEET = "tcp://llm-{leader}.llm:29500"
SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.mark.parametrize(
    ("ordinal", "group", "rank", "rendezvous"),
    [
        ("0", "llm-0", 0, "tcp://llm-0.llm:29500"),
        ("llm-1", "llm-0", 1, "tcp://llm-0.llm:29500"),
        ("llm-2", "llm-1", 0, "tcp://llm-2.llm:29500"),
        ("llm-11", "llm-5", 1, "tcp://llm-10.llm:29500"),
    ],
)
def test_ordinals_count_the_ranks_of_all_groups_that_meet(
    ordinal: str, group: str, rank: int, rendezvous: str
) -> None:
    placed = resolve_rank(LlmSettings(tp=2, ordinal=ordinal, rendezvous=MEET))
    assert (placed.group, placed.rank, placed.rendezvous) == (group, rank, rendezvous)


def test_ordinals_count_groups_where_each_starts_its_own_ranks() -> None:
    placed = resolve_rank(LlmSettings(tp=4, ordinal="llm-3"))
    assert (placed.group, placed.rank, placed.rendezvous) == ("llm-3", 0, "")


def test_an_ordinal_without_a_number_is_refused_by_its_name() -> None:
    with pytest.raises(BadSetting, match="--ordinal 'llm'"):
        resolve_rank(LlmSettings(ordinal="llm"))


def test_without_an_ordinal_settings_are_as_they_are_given() -> None:
    given = LlmSettings(tp=2, rank=1, group="mine", rendezvous="file:///tmp/meet")
    assert resolve_rank(given) == given


def test_ranks_that_meet_over_tcp_share_no_cores() -> None:
    assert num_ranks_here(LlmSettings(tp=4, rendezvous="tcp://host:1")) == 1
    assert (
        num_ranks_here(LlmSettings(tp=4, rendezvous="file:///tmp/meet"))
        == num_ranks_here(LlmSettings(tp=4))
        == 4
    )


@pytest.mark.parametrize(
    ("listen", "expected"),
    [("tcp://0.0.0.0:5555", "tcp://0.0.0.0:*"), ("ipc:///run/llm.sock", "ipc:///run/llm.sock.2")],
)
def test_a_rank_started_beside_is_told_all_that_this_one_was(
    listen: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINLENS_ORDINAL", "llm-7")
    monkeypatch.setenv("TWINLENS_HEALTH_PORT", "8080")
    mine = LlmSettings(
        tp=4,
        ordinal="llm-7",
        group="llm-7",
        listen=listen,
        advertise="10.0.0.9",
        max_num_seqs=3,
        health_port=8080,
        rendezvous="file:///meet",
    )
    command = command_of(mine, 2)
    assert command[:3] == [sys.executable, "-m", "services.llm"]
    told = load(LlmSettings, argparse.ArgumentParser(), command[3:], {"ordinal"})
    assert resolve_rank(told) == told
    assert (told.rank, told.listen, told.health_port) == (2, expected, 0)
    assert (told.tp, told.group, told.advertise, told.max_num_seqs, told.rendezvous) == (
        4,
        "llm-7",
        "10.0.0.9",
        3,
        "file:///meet",
    )


@pytest.mark.parametrize("settings", [LlmSettings(), LlmSettings(tp=2, rendezvous="tcp://host:1")])
def test_nothing_is_started_where_there_is_one_rank_or_someone_else_starts_them(
    settings: LlmSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda command: pytest.fail(f"started {command}"))
    with other_ranks(settings) as same:
        assert same == settings


def test_the_ranks_started_end_with_the_block_and_that_is_no_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    left: list[int] = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command: started.append(popen(SLEEPER)) or started[-1]
    )
    monkeypatch.setattr(grouping, "leave", left.append)
    with other_ranks(LlmSettings(tp=3)) as settings:
        assert [process.poll() for process in started] == [None, None]
        folder = Path(settings.rendezvous.removeprefix("file://")).parent
        assert folder.is_dir()
        watchers = [
            thread for thread in threading.enumerate() if getattr(thread, "_target", None) is watch
        ]
    for thread in watchers:
        thread.join()
    assert None not in [process.poll() for process in started]
    assert left == [] and not folder.exists()


@pytest.mark.parametrize(("status", "expected"), [(EXIT_USAGE, EXIT_USAGE), (7, EXIT_FAILED)])
def test_a_rank_that_ends_takes_this_process_along(
    status: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(grouping, "leave", left.append)
    watch(
        subprocess.Popen([sys.executable, "-c", f"raise SystemExit({status})"]), threading.Event()
    )
    assert left == [expected]


@pytest.mark.parametrize(("ordinal", "num_names"), [("", 2), ("llm-7", 1)])
def test_groups_that_nobody_numbered_have_names_of_their_own(
    ordinal: str, num_names: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when one container is scaled to two: rank 0 would connect to the ranks of the other."""
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command: popen(SLEEPER))
    names = set()
    for _ in range(2):
        with other_ranks(LlmSettings(tp=2, group="llm", ordinal=ordinal)) as settings:
            names.add(settings.group)
    assert len(names) == num_names
