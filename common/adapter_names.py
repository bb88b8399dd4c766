"""What LoRA adapters may be called, and where they may lie."""

import os
import re
from pathlib import Path

from common.config import BadSetting
from common.families import Family
from common.messages import MAX_ADAPTERS, MAX_PATH_BYTES, NO_CONTROL_CHARACTERS
from common.settings import LoraSettings

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


def adapters_of(settings: LoraSettings, family: Family, served_name: str) -> dict[str, str]:
    """Return the directories of the adapters that the settings name, by their names.

    Raises
    ------
    BadSetting
        if a group of this family cannot have them, or cannot load others at run time.
    """
    adapters = parse_adapters(settings.lora)
    root = settings.lora_root
    if (adapters or root) and not family.lora_modules:
        raise BadSetting(f"--lora: there are no LoRA adapters for {family.title}")
    if root and not Path(root).expanduser().is_dir():
        raise BadSetting(f"--lora-root {root}: no such folder")
    if served_name in adapters:
        raise BadSetting(f"--lora {served_name}=...: this is the name of the served model")
    if len(adapters) > settings.max_loras:
        raise BadSetting(
            f"--lora names {len(adapters)} adapters, --max-loras is {settings.max_loras} (at most "
            f"{MAX_ADAPTERS})"
        )
    return adapters
