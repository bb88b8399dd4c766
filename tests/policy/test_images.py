"""The Dockerfile and its lock files are checked without an engine."""

import re
import tomllib
from functools import cache
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

from common.settings import KNOWN_NAMES
from tests.policy.sources import ROOT

EXTRAS = {
    "slim": (
        "guided",
        "video",
    ),
    "cpu": ("guided", "video", "engine"),
    "cuda": ("guided", "video", "engine"),
}


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@cache
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


def stage(name: str) -> str:
    """Return the lines of one stage, from its FROM to the next."""
    (found,) = re.findall(
        rf"^(FROM \S+ AS {name}\n.*?)(?=^FROM |\Z)", dockerfile(), re.MULTILINE | re.DOTALL
    )
    return found


def locked(target: str) -> dict[str, str]:
    """Return the version of each locked package for CPython 3.11 on Linux."""
    environment = default_environment() | {
        "python_version": "3.11",
        "python_full_version": "3.11.9",
        "sys_platform": "linux",
    }
    lines = (ROOT / "requirements" / f"{target}.txt").read_text().splitlines()
    found = [Requirement(line.rstrip(" \\")) for line in lines if line and line[0].isalnum()]
    return {
        r.name: str(r.specifier).removeprefix("==")
        for r in found
        if not r.marker or r.marker.evaluate(environment)
    }


def unmet(wanted: list[str], lock: dict[str, str]) -> list[str]:
    """Return the requirements that the lock file does not meet."""
    requirements = [Requirement(text) for text in wanted]
    names = {name.replace("_", "-").lower(): version for name, version in lock.items()}
    return [
        str(r)
        for r in requirements
        if not (v := names.get(r.name.replace("_", "-").lower())) or not r.specifier.contains(v)
    ]


@pytest.mark.parametrize("target", EXTRAS)
def test_the_lock_holds_what_the_project_asks_for(target: str) -> None:
    wanted = project()["dependencies"] + [
        r for extra in EXTRAS[target] for r in project()["optional-dependencies"][extra]
    ]
    expected = [r for r in wanted if r.startswith("torch==")] if target == "cpu" else []
    assert unmet(wanted, locked(target)) == expected, "run scripts/lock"
    assert unmet(["numpy>=1000"], locked(target)) == ["numpy>=1000"]


@pytest.mark.parametrize("target", EXTRAS)
def test_every_locked_package_has_hashes(target: str) -> None:
    packages = re.split(r"\n(?=\S)", (ROOT / "requirements" / f"{target}.txt").read_text())
    assert [
        package.split()[0]
        for package in packages
        if not package.startswith("#") and "--hash=sha256:" not in package
    ] == []


def test_the_locks_agree_with_each_other() -> None:
    slim, cpu, cuda = map(locked, EXTRAS)
    assert slim.items() <= cpu.items() <= cuda.items()


def test_the_cpu_image_has_the_torch_that_the_project_pins() -> None:
    (pinned,) = [r for r in project()["optional-dependencies"]["engine"] if r.startswith("torch")]
    assert f"ARG TORCH={pinned}+cpu\n" in dockerfile()
    assert locked("cuda")["torch"] == pinned.removeprefix("torch==")


def test_the_images_carry_the_projects_version() -> None:
    assert f"ARG VERSION={project()['version']}\n" in dockerfile()


def test_the_variables_of_the_images_are_settings() -> None:
    assert {name.lower() for name in re.findall(r"\bTWINLENS_(\w+)=", dockerfile())} <= KNOWN_NAMES


def test_no_image_runs_as_root_and_only_that_of_cards_has_a_compiler() -> None:
    """Triton needs one where its kernels run."""
    for target in ("runtime", "cuda"):
        users = re.findall(r"^USER (.*)$", stage(target), re.MULTILINE)
        assert users[-1] == "10001:10001"
    for target in EXTRAS:
        assert stage(target).startswith("FROM runtime AS ")
        assert target == "cuda" or (
            "apt-get" not in stage(target)
            and "pip" not in stage(target)
            and "USER" not in stage(target)
        )


def test_an_engine_without_frontends_from_a_registry_builds_it() -> None:
    """Engine 20.10 has neither heredocs nor linked copies; a syntax line would fetch an image."""
    assert not re.search(r"^#\s*syntax|<<|--link|start-interval", dockerfile(), re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", dockerfile(), re.MULTILINE)) == {
        "python:3.11-slim",
        "base",
        "build",
        "runtime",
    }
