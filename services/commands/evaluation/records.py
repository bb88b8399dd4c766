"""The records of a run: what was asked and answered, kept so that a run can be continued."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from services.commands.client import ClientError
from services.commands.evaluation.data import BadData, read_json_lines
from services.commands.evaluation.task import Answered, Item

SETTINGS = "settings.json"
RECORDS = "records.jsonl"
TABLE = "table.md"
RESULT = "result.json"
FIELDS = frozenset(["id", "input", "output", "error", "finish_reason", "e2e_time"])
Record = dict[str, Any]
"""`id`, `input`, `output`, `error`, `finish_reason`, `e2e_time` in seconds, and `score` once the
run is complete."""


class Records:
    """The records of one run in a folder. Those of an interrupted run with the same settings stay.

    Raises
    ------
    ClientError
        If the folder holds a run with other settings, or cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], restart: bool) -> None:
        self.folder = folder
        self._records: dict[str, Record] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if restart:
                (folder / RECORDS).unlink(missing_ok=True)
            elif (folder / RECORDS).exists():
                self._check_settings(settings)
                self._records = {record["id"]: record for record in read_records(folder / RECORDS)}
            write(folder / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ClientError(f"cannot write {folder}: {error.strerror}") from error

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        try:
            kept = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = {}
        for name, value in settings.items():
            if kept.get(name) != value:
                raise ClientError(
                    f"{self.folder} holds a run with another {name} ({kept.get(name)!r}, now "
                    f"{value!r}): set another --out, or discard that run with --restart"
                )

    def check_inputs(self, items: Iterable[Item]) -> None:
        """Raise ClientError if an item was recorded with another input than it has now."""
        for item in items:
            record = self._records.get(item.id)
            if record is not None and record["input"] != item.text:
                raise ClientError(
                    f"{self.folder} holds a run that asked item {item.id} something else: set "
                    "another --out, or discard that run with --restart"
                )

    def unanswered(self, items: Sequence[Item]) -> list[Item]:
        """Return the items that have no record, or whose request failed."""
        return [
            item for item in items if self._records.get(item.id, {"error": "not asked"})["error"]
        ]

    def add(self, record: Record) -> None:
        """Keep a record, in the file at once."""
        self._records[record["id"]] = record
        with (self.folder / RECORDS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def first_failure(self, items: Iterable[Item]) -> str:
        """Return what went wrong with the first item that failed; "" if none did."""
        errors = ((item.id, self._records[item.id]["error"]) for item in items)
        return next((f"item {id}: {error}" for id, error in errors if error), "")

    def cut_off(self, items: Iterable[Item]) -> int:
        """Return the number of answers that ended because they were as long as allowed."""
        return sum(self._records[item.id]["finish_reason"] == "length" for item in items)

    def answers(self, items: Iterable[Item]) -> list[Answered]:
        """Return the items with their answers. Every item must have a record."""
        answered = []
        for item in items:
            record = self._records[item.id]
            failed = bool(record["error"])
            seconds = record["e2e_time"]
            answered.append(Answered(item, "" if failed else record["output"], failed, seconds))
        return answered

    def write_scores(self, answered: Sequence[Answered], parts: Sequence[dict[str, Any]]) -> None:
        """Write the scored records in the order of the items, in place of those kept so far."""
        for one, score in zip(answered, parts, strict=True):
            self._records[one.item.id]["score"] = score
        order = [one.item.id for one in answered]
        # Those of another --limit stay.
        ids = dict.fromkeys([*order, *self._records])
        lines = [json.dumps(self._records[id], ensure_ascii=False) for id in ids]
        write(self.folder / RECORDS, "".join(f"{line}\n" for line in lines))


def read_records(path: Path) -> Iterable[Record]:
    """Yield the records of a file. A last line that an interruption cut off is left out."""
    lines = path.read_bytes()
    if lines and not lines.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(lines.rfind(b"\n") + 1)
    for place, record in read_json_lines(path):
        if not record.keys() >= FIELDS:
            raise BadData(f"{place}: expected a record of `twinlens eval`")
        yield record


def write(path: Path, text: str) -> None:
    """Write a file, which appears when it is whole."""
    unfinished = path.with_name(f".{path.name}-{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
