"""What LoRA adapters may be called, and where they may lie."""

import os
import re
from pathlib import Path

from common.config import BadSetting
from common.messages import MAX_ADAPTERS, MAX_PATH_BYTES, NO_CONTROL_CHARACTERS

MAX_NAME_BYTES = 190


def parse_adapters(text: str) -> dict[str, str]:
    """Return the directories that `--lora` names, by the names of the adapters.

    Raises
    ------
    BadSetting
        if an entry is not NAME=DIR, or a name comes twice.
    """
    found: dict[str, str] = {}
    for entry in filter(None, text.split(",")):
        name, _, path = entry.partition("=")
        if objection := objection_to_adapter(name, path):
            raise BadSetting(f"--lora {entry}: {objection}")
        if name in found:
            raise BadSetting(f"--lora names {name!r} twice: give each adapter a name of its own")
        found[name] = path
    return found


def objection_to_adapter(name: str, path: str) -> str:
    """Return why a name and a directory cannot be those of an adapter; "" if they can."""
    if not name or not path:
        return "give NAME=DIR, a name for clients and the directory of the adapter"
    if len(name.encode()) > MAX_NAME_BYTES or not re.match(NO_CONTROL_CHARACTERS, name):
        return f"a name has at most {MAX_NAME_BYTES} bytes, and no control characters"
    if len(os.fsencode(path)) > MAX_PATH_BYTES or "\0" in path:
        return f"a path has at most {MAX_PATH_BYTES} bytes"
    return ""


def check_adapter_settings(
    adapters: dict[str, str], root: str, served_name: str, max_loras: int
) -> None:
    """Raise BadSetting if one group cannot have these adapters, or load others from this folder."""
    if root and not Path(root).expanduser().is_dir():
        raise BadSetting(f"--lora-root {root}: no such folder")
    if served_name in adapters:
        raise BadSetting(f"--lora {served_name}=...: this is the name of the served model")
    if len(adapters) > max_loras:
        raise BadSetting(
            f"--lora names {len(adapters)} adapters, --max-loras is {max_loras} (at most "
            f"{MAX_ADAPTERS})"
        )
