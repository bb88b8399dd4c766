"""The images are small, have no compiler, do not run as root, and run their services."""

import json

import pytest

from common.settings import SERVICES
from tests.deploy.composed import docker, inspect

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("images"), pytest.mark.timeout(1200)]

MAX_SLIM_BYTES = 250_000_000
CONFINED = ("--rm", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--network", "none")
WITHOUT_TORCH = ("controller", "gateway", "preprocess", "detokenizer")
KERNELS = """
import torch
from compute.kernels.library import bfloat16_kernels, cpu_flags, sources_for
print(bfloat16_kernels() is not None, sources_for(cpu_flags()) is not None)
"""


def in_image(image: str, *command: str) -> str:
    return docker("run", *CONFINED, "--entrypoint", command[0], image, *command[1:])


def test_the_slim_image_is_small() -> None:
    base, slim = (inspect(image, ".Size") for image in ("python:3.11-slim", "twinlens:slim"))
    print(f"{(slim - base) / 1e6:.0f} MB above the base image's {base / 1e6:.0f}")
    assert slim - base <= MAX_SLIM_BYTES


@pytest.mark.parametrize("image", ["twinlens:slim", "twinlens:cpu"])
def test_an_image_runs_as_a_user_without_a_compiler_and_says_what_it_is(image: str) -> None:
    config = inspect(image, ".Config")
    assert config["User"] == "10001:10001"
    assert config["Labels"]["org.opencontainers.image.title"] == "Twinlens"
    assert config["Healthcheck"]["Test"] == ["CMD", "twinlens-probe"]
    assert in_image(image, "sh", "-c", "command -v gcc cc pip-compile || true; id -u") == "10001\n"


@pytest.mark.parametrize(
    ("role", "image"), [(role, "slim" if role in WITHOUT_TORCH else "cpu") for role in SERVICES]
)
def test_every_service_starts_in_its_image(role: str, image: str) -> None:
    assert f"usage: python -m services.{role}" in docker(
        "run", *CONFINED, f"twinlens:{image}", f"services.{role}", "--help"
    )


def test_torch_is_in_the_image_that_needs_it_and_in_no_other() -> None:
    program = (
        "import importlib.util, json; print(json.dumps({n: "
        "bool(importlib.util.find_spec(n)) for n in ('torch', 'transformers')}))"
    )
    found = {
        image: json.loads(in_image(f"twinlens:{image}", "python", "-c", program))
        for image in ("slim", "cpu")
    }
    assert found == {
        "slim": {"torch": False, "transformers": False},
        "cpu": {"torch": True, "transformers": False},
    }


def test_the_kernels_are_there_without_a_compiler() -> None:
    """They were compiled while the image was built. Not every CPU has the instructions for them."""
    loaded, expected = in_image("twinlens:cpu", "python", "-c", KERNELS).split()
    assert loaded == expected
