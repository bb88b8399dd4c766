"""The memory that a reference may use."""

from pathlib import Path

import pytest

from services.commands.client import ClientError
from services.commands.verification import memory

MIB = 1 << 20


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 4096 kB\n")
    return file


def test_without_a_limit_the_host_counts(meminfo: Path, tmp_path: Path) -> None:
    assert memory.available(meminfo, tmp_path / "none") == 4 * MIB


def test_the_files_that_a_container_has_cached_give_way(meminfo: Path, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{3 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * MIB}\n")
    (tmp_path / "memory.stat").write_text(
        f"anon {MIB}\nactive_file {MIB}\ninactive_file {MIB // 2}\n"
    )
    assert memory.available(meminfo, tmp_path) == 3 * MIB // 2


def test_too_little_memory_is_refused_before_anything_starts() -> None:
    memory.check_memory(1)
    with pytest.raises(ClientError, match=r"needs 1048576\.0 GiB of memory, .* run it on another"):
        memory.check_memory(1 << 50)
