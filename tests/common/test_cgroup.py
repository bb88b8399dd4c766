"""The limits of a container are read from files as the kernel writes them."""

from pathlib import Path

import pytest

from common.cgroup import container_memory, core_limit
from compute.device import set_threads


@pytest.mark.parametrize(
    ("text", "cores"),
    [("200000 100000\n", 2), ("150000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", None)],
)
def test_cores_of_version_2(tmp_path: Path, text: str, cores: int | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert core_limit(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("400000\n", 4), ("-1\n", None)])
def test_cores_of_version_1(tmp_path: Path, quota: str, cores: int | None) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert core_limit(tmp_path) == cores


def test_a_host_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert core_limit(tmp_path) is None


def test_a_service_uses_no_more_threads_than_its_container_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More would be stopped together whenever their share of a period is used up, and wait for each
    other."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(64))
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    monkeypatch.setattr("common.cgroup.core_limit", lambda: 3)
    assert set_threads(None, 1) == 3
    monkeypatch.setattr("common.cgroup.core_limit", lambda: None)
    assert set_threads(None, 1) == 32


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, []),
        ({"memory.max": "max\n", "memory.current": "5\n"}, []),
        ({"memory.max": "100\n", "memory.current": "30\n"}, [70]),
        ({"memory/memory.limit_in_bytes": "100", "memory/memory.usage_in_bytes": "130"}, [0]),
    ],
)
def test_a_containers_limit_counts(
    files: dict[str, str], expected: list[int], tmp_path: Path
) -> None:
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert container_memory(tmp_path) == expected
