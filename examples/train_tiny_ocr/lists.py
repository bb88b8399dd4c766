"""The lists of fonts, words and phrases in lists.toml."""

import tomllib
from pathlib import Path

FILE = tomllib.loads((Path(__file__).parent / "lists.toml").read_text(encoding="utf-8"))


def listed(section: str, name: str) -> list[str]:
    entry = FILE[section][name]
    return entry.split() if isinstance(entry, str) else entry
