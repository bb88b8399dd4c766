"""What a folder, a log line, or a want of descriptors can do to the launcher."""

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog

from common.config import BadSetting
from common.membership import READY
from common.progress import Progress
from proto.twinlens.control.v1 import control_pb2
from services.launcher import child as child_module
from services.launcher import run_dir as run_dir_module
from services.launcher import supervisor as supervisor_module
from services.launcher.child import Child
from services.launcher.run_dir import LOCK, open_run_dir
from tests.launcher.conftest import Supervise
from tests.launcher.conftest import launch as launch  # fixtures
from tests.launcher.conftest import supervise as supervise
from tests.launcher.processes import MODEL, child_named, pids, report, wait_for_status


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files. pytest's own has too long a path for sockets."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


# The folder of the sockets


def test_the_folder_is_for_its_owner_only_and_goes_with_the_launcher(temporary: Path) -> None:
    with open_run_dir() as folder:
        assert folder.parent == temporary
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(temporary.iterdir()) == []


def test_the_folder_of_a_killed_launcher_is_removed_and_that_of_a_living_one_is_kept(
    temporary: Path,
) -> None:
    program = (
        "import sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from services.launcher.run_dir import open_run_dir\n"
        "with open_run_dir() as folder: print(folder, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(temporary)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as killed:
        assert killed.stdout is not None
        abandoned = Path(killed.stdout.readline().strip())
        killed.kill()
        killed.wait()
    assert (abandoned / LOCK).exists()
    with open_run_dir() as first, open_run_dir():
        assert not abandoned.exists()
        assert (first / LOCK).exists()


def test_a_folder_without_a_lock_is_somebody_elses(temporary: Path) -> None:
    (temporary / "twinlens-mine").mkdir()
    (temporary / "twinlens-link").mkdir()
    (temporary / "twinlens-link" / LOCK).symlink_to("/etc/passwd")
    with open_run_dir():
        pass
    assert len(list(temporary.iterdir())) == 2


def test_a_missing_folder_for_temporary_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    with pytest.raises(BadSetting, match="set TMPDIR"), open_run_dir():
        pass


def test_a_path_too_long_for_sockets_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(BadSetting, match="too long a path for sockets"), open_run_dir():
        pass
    assert list(folder.iterdir()) == []


def test_a_lock_is_named_only_once_it_is_held(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def look(file: object, how: int) -> None:
        seen.extend((folder / LOCK).exists() for folder in temporary.iterdir())
        fcntl_flock(file, how)  # type: ignore[arg-type]

    fcntl_flock = fcntl.flock
    monkeypatch.setattr(run_dir_module.fcntl, "flock", look)
    with open_run_dir():
        pass
    assert seen == [False]


# Children


def test_a_controller_that_is_stopped_is_replaced(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(supervisor_module, "Progress", lambda: Progress(lambda: now[0]))
    supervisor = supervise()
    supervisor.keep_running()
    before = pids(supervisor)["controller-0"]
    report(supervisor)
    os.kill(before, signal.SIGSTOP)
    while child_named(supervisor, "controller-0").process.poll() is None and now[0] < 160:
        now[0] += 1.0
        supervisor.keep_running()
        if now[0] > 113:
            wait_for_status(supervisor, "controller-0")
    assert 110 < now[0] < 120
    supervisor.keep_running()
    assert pids(supervisor)["controller-0"] != before


def test_a_controller_that_answers_is_kept_and_so_is_one_whose_launcher_was_stopped(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(supervisor_module, "Progress", lambda: Progress(lambda: now[0]))
    supervisor = supervise()
    supervisor.keep_running()
    before = pids(supervisor)["controller-0"]
    for _ in range(100):
        now[0] += 1.0
        report(supervisor)
        supervisor.keep_running()
    now[0] += 1000.0
    supervisor.keep_running()
    assert pids(supervisor)["controller-0"] == before


def test_a_log_line_without_end_takes_little_memory(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[int] = []
    log = SimpleNamespace(write=lambda data: pieces.append(len(data)), flush=lambda: None)
    line = "import sys; sys.stderr.write('x' * 20_000_000); sys.exit(1)"
    supervisor = supervise({"vision": line})
    monkeypatch.setattr(
        child_module.sys, "stderr", SimpleNamespace(buffer=log, isatty=lambda: False)
    )
    supervisor.keep_running()
    child = child_named(supervisor, "vision-0")
    wait_for_status(supervisor, "vision-0")
    assert child.relay is not None
    child.relay.join()
    assert sum(pieces) == 20_000_000 and max(pieces) <= child_module.MAX_LINE_BYTES
    assert sum(map(len, child.last_lines)) <= (
        child_module.NUM_LAST_LINES * child_module.MAX_LAST_LINE_CHARS
    )


def test_a_child_that_cannot_be_started_for_want_of_descriptors_is_started_later(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "LAST_BACKOFF_SECONDS", 0.0)
    supervisor = supervise()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with structlog.testing.capture_logs() as logs:
            assert supervisor.keep_running() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert pids(supervisor) == {}
    assert {entry["event"] for entry in logs} == {"cannot start a process now; trying again"}
    supervisor.keep_running()
    assert len(pids(supervisor)) == 6


def test_no_other_member_speaks_for_a_child(supervise: Supervise) -> None:
    """A member that claims a child's pid, and to hang, once got the child killed."""
    supervisor = supervise()
    supervisor.keep_running()
    before = pids(supervisor)
    pid = before["vision-0"]
    for fields in ({"id": "vision-9-abc", "role": "vision"}, {"id": "vision-0-abc", "role": "llm"}):
        liar = control_pb2.Member(pid=pid, state=READY, hung=True, **fields)
        supervisor.on_response(control_pb2.JoinResponse(members=[liar]))
        assert child_named(supervisor, "vision-0").member is None
    report(supervisor)
    liar = control_pb2.Member(id="vision-0-zzz", role="vision", pid=pid, state=READY, hung=True)
    supervisor.on_response(control_pb2.JoinResponse(members=[liar]))
    supervisor.keep_running()
    assert pids(supervisor) == before
    member = child_named(supervisor, "vision-0").member
    assert member is not None and not member.hung


def test_only_the_controller_learns_the_launchers_key(supervise: Supervise) -> None:
    supervisor = supervise()
    supervisor.keep_running()
    for child in supervisor.fleet.children:
        assert child.process is not None
        environment = Path(f"/proc/{child.process.pid}/environ").read_bytes()
        assert (supervisor.key.encode() in environment) == (child.role == "controller")


def test_the_ranks_of_a_group_meet_though_one_could_not_be_started_at_first(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "LAST_BACKOFF_SECONDS", 0.0)
    supervisor = supervise(tp=2)
    popen = subprocess.Popen
    failures = [OSError(24, "Too many open files")]

    def fail_once(*arguments: object, **options: object) -> object:
        if "llm-0" in failing and failures:
            raise failures.pop()
        return popen(*arguments, **options)  # type: ignore[call-overload]

    failing: list[str] = []
    command = supervisor._command

    def note(child: Child, run_dir: Path) -> list[str]:
        failing[:] = [child.name]
        return command(child, run_dir)

    monkeypatch.setattr(supervisor, "_command", note)
    monkeypatch.setattr(child_module.subprocess, "Popen", fail_once)
    supervisor.keep_running()
    assert "llm-0" not in pids(supervisor) and "llm-0.1" in pids(supervisor)
    supervisor.keep_running()
    starts = {c.name: c.num_starts for c in supervisor.fleet.children if c.role == "llm"}
    assert starts == {"llm-0": 1, "llm-0.1": 1}


def test_a_child_goes_on_logging_when_nobody_reads_the_launchers_log(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed:
        def write(self, data: bytes) -> None:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    line = "import sys; [print('x' * 100, file=sys.stderr) for _ in range(10_000)]; sys.exit(7)"
    supervisor = supervise({"vision": line})
    closed = SimpleNamespace(buffer=Closed(), isatty=lambda: False)
    monkeypatch.setattr(child_module.sys, "stderr", closed)
    supervisor.keep_running()
    assert wait_for_status(supervisor, "vision-0") == 7


# Locales


@pytest.mark.parametrize("command", [["plan"], ["serve", "--http-port", "0"]], ids=" ".join)
def test_a_command_writes_any_name_in_any_locale(tmp_path: Path, command: list[str]) -> None:
    model = shutil.copytree(MODEL, tmp_path / "modèle")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", *command, "--model", str(model)],
        env=os.environ | locale,
        capture_output=True,
        timeout=60,
    )
    said = done.stdout + done.stderr
    assert b"Traceback" not in said
    assert (b"Qwen2.5-VL" if command == ["plan"] else b"--http-port 0: must be from 1") in said


def test_any_text_can_be_written_in_any_locale() -> None:
    program = (
        "from common.process import write_utf8; write_utf8(); print(chr(0xeb)); print(chr(0xdcff))"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | locale, capture_output=True, timeout=60
    )
    assert done.stdout.splitlines() == ["ë".encode(), b"\\udcff"], done.stderr


def test_children_name_files_in_utf8() -> None:
    assert child_module.child_environment("llm")["PYTHONUTF8"] == "1"
