"""The replicas that the settings of `twinlens serve` ask for, and their children's arguments."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from common.config import arguments_of
from common.logs import wants_console
from common.settings import SERVICES, ServeSettings
from services.launcher.autoscale import parse_bounds
from services.launcher.child import Child


def replica_counts(settings: ServeSettings) -> dict[str, int]:
    """Return how many replicas of each role to start with."""
    vision = settings.vision
    if settings.autoscale:
        vision = max(vision, parse_bounds(settings.autoscale).least)
    return {
        "controller": 1,
        "gateway": 1,
        "detokenizer": settings.detokenizer,
        "preprocess": settings.preprocess,
        "vision": vision,
        "llm": settings.llm,
    }


def control_address(run_dir: Path) -> str:
    """Return the gRPC address of the controller."""
    return f"unix:{run_dir}/control.sock"


def make_children(settings: ServeSettings, run_dir: Path, role: str, number: int) -> list[Child]:
    """Return the children of replica `number` of a role: one, or the ranks of a language group."""
    if role != "llm":
        return [make_child(settings, run_dir, role, f"{role}-{number}")]
    group = f"llm-{number}"
    names = [group, *(f"{group}.{rank}" for rank in range(1, settings.tp))]
    local_groups = max(settings.llm, number + 1)
    return [
        make_child(settings, run_dir, role, name, group, rank=rank, local_groups=local_groups)
        for rank, name in enumerate(names)
    ]


def make_child(
    settings: ServeSettings, run_dir: Path, role: str, name: str, group: str = "", **own: Any
) -> Child:
    """Return a child whose flags are its own settings and those that it shares with `serve`."""
    shared = {field.name: getattr(settings, field.name) for field in fields(settings)}
    values = shared | own
    values |= {
        "controller": control_address(run_dir),
        "control_listen": control_address(run_dir),
        "listen": f"ipc://{run_dir}/{name}.sock",
        "name": name,
        "group": group,
        "drain_delay": 0.0,
        "log_format": "console" if wants_console(settings.log_format) else "json",
        "die_with_parent": os.getpid(),
    }
    known = {field.name for field in fields(SERVICES[role])}
    arguments = arguments_of({key: value for key, value in values.items() if key in known})
    return Child(role, name, arguments, group)
