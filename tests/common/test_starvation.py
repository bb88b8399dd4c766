"""How long threads have waited for a core, by the kernel's figures."""

import threading
from pathlib import Path

from common.starvation import Starvation


def write(tasks: Path, **delays: float) -> None:
    for thread, seconds in delays.items():
        task = tasks / thread.removeprefix("t")
        task.mkdir(exist_ok=True)
        (task / "schedstat").write_text(f"123456 {int(seconds * 1e9)} 78\n")


def test_the_thread_that_waited_most_since_the_last_call_counts(tmp_path: Path) -> None:
    starvation = Starvation(tmp_path)
    write(tmp_path, t1=10.0, t2=20.0)
    assert starvation.since_last() == 0.0, "nobody knows since when"
    write(tmp_path, t1=10.5, t2=20.25, t3=99.0)
    assert starvation.since_last() == 0.5
    write(tmp_path, t3=99.75)
    assert starvation.since_last() == 0.75
    assert starvation.since_last() == 0.0


def test_the_watching_thread_does_not_count(tmp_path: Path) -> None:
    starvation = Starvation(tmp_path)
    own = f"t{threading.get_native_id()}"
    write(tmp_path, **{own: 1.0})
    starvation.since_last()
    write(tmp_path, **{own: 2.0})
    assert starvation.since_last() == 0.0


def test_a_kernel_that_does_not_count_excuses_nothing(tmp_path: Path) -> None:
    assert Starvation(tmp_path / "missing").since_last() == 0.0


def test_this_kernel_counts() -> None:
    starvation = Starvation()
    starvation.since_last()
    assert starvation.since_last() >= 0.0
