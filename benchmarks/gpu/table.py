"""The tables of a run in Markdown, as docs/performance.md has them."""

from typing import Any

NAMED = ("table", "part")
"""What a row has besides its columns."""
DRY = " (dry)"
DRY_TITLE = "Dry run on the CPU at toy size: no figure says anything about a card"


def markdown(machine: dict[str, Any], results: list[dict[str, Any]], dry_run: bool) -> str:
    """Return the whole text: the machine, how each part ended, and the tables of their rows.

    Each figure of a dry run is marked as such.
    """
    title = DRY_TITLE if dry_run else ""
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    parts = [
        {
            "part": result["part"],
            "status": result["status"],
            "seconds": round(result["seconds"]),
            "reason": result["reason"],
        }
        for result in results
    ]
    texts = [title, facts, render(parts, "")]
    rows = [row for result in results for row in result["rows"]]
    for name in dict.fromkeys(row["table"] for row in rows):
        own = [
            {key: value for key, value in row.items() if key not in NAMED}
            for row in rows
            if row["table"] == name
        ]
        texts.append(f"### {name}\n\n{render(own, DRY if dry_run else '')}")
    return "\n\n".join(filter(None, texts)) + "\n"


def render(rows: list[dict[str, Any]], mark: str) -> str:
    """Return a Markdown table with a column for each key. `mark` follows each figure."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        [key.replace("_", " ") for key in keys],
        ["---"] * len(keys),
        *([cell(key, row.get(key), mark) for key in keys] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(key: str, value: Any, mark: str) -> str:
    """Return the text of a value; what is called a share is a percentage."""
    match value:
        case None:
            return ""
        case bool():
            return f"{'yes' if value else '**no**'}{mark}"
        case int() | float() if "share" in key:
            return f"{value:.1%}{mark}"
        case float():
            return f"{number(value)}{mark}"
        case int():
            return f"{value:,}{mark}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def number(value: float) -> str:
    """Return about three significant digits, without an exponent unless the value is tiny."""
    if value and abs(value) < 0.001:
        return f"{value:.1e}"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 4
    return f"{value:,.{digits}f}"
