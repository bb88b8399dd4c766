"""`twinlens eval`: asks a system the questions of a benchmark and scores its answers."""

import argparse
import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.commands.chat_client import Answer, ChatClient, add_url_argument, choose_model
from services.commands.client import ClientError, run_command, whole_number
from services.commands.evaluation.data import BadData, read_json, read_json_lines, read_text
from services.commands.evaluation.prompts import QUESTION
from services.commands.evaluation.records import RESULT, TABLE, Record, Records, write
from services.commands.evaluation.runner import Asking, ask, record_of
from services.commands.evaluation.table import markdown
from services.commands.evaluation.task import Answered, Item, Scores, Task
from services.commands.evaluation.tasks import TASKS
from services.commands.output import answer_text, json_line, one_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a parser for each task, with the flags that all tasks have and its own."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for task in TASKS.values():
        own = tasks.add_parser(task.name, help=task.help, description=task.help, allow_abbrev=False)
        add_common_arguments(own, task)
        task.add_arguments(own)


def add_common_arguments(parser: argparse.ArgumentParser, task: Task) -> None:
    parser.add_argument("--data", required=True, type=Path, metavar="PATH", help=task.data)
    add_url_argument(parser)
    parser.add_argument(
        "--answers",
        type=Path,
        metavar="PATH",
        help="score these answers and ask no system: JSON {ITEM: ANSWER}, a records.jsonl, or a "
        "folder of files that are named as the items",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for records and table; a rerun continues what is there (default: eval-TASK)",
    )
    parser.add_argument(
        "--restart", action="store_true", help="discard the records in --out and ask again"
    )
    parser.add_argument(
        "--prompt",
        metavar="TEMPLATE",
        help="the prompt (default: by task and model, see the table)",
    )
    parser.add_argument(
        "--limit",
        type=whole_number(1, 2**31),
        metavar="N",
        help="only the first N items",
    )
    add_request_arguments(parser, task.max_tokens)


def add_request_arguments(parser: argparse.ArgumentParser, max_tokens: int | None) -> None:
    parser.add_argument(
        "--concurrency",
        type=whole_number(1, 4096),
        default=8,
        metavar="N",
        help="requests in flight at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=whole_number(1, 2**31),
        default=max_tokens,
        metavar="N",
        help=f"the longest answer (default: {max_tokens or 'what is left of the context'})",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 always takes the most likely token (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**63 - 1),
        default=1234,
        metavar="N",
        help="of every request; matters above temperature 0 (default: %(default)s)",
    )


def evaluate(arguments: argparse.Namespace) -> int:
    """Run a task, print its table and one JSON object, and return the exit status."""
    return run_command(run_task, arguments)


def run_task(arguments: argparse.Namespace) -> None:
    task = TASKS[arguments.task]
    arguments.out = arguments.out or Path(f"eval-{task.name}")
    if arguments.answers is not None:
        answered, records = given_answers(task, arguments)
    else:
        answered, records = asyncio.run(asked_answers(task, arguments))
    scores = task.score(answered, arguments)
    records.write_scores(answered, scores.parts)
    facts = facts_of(arguments, answered)
    items = [one.item for one in answered]
    if failure := records.first_failure(items):
        facts["first failure"] = one_line(failure)
    if count := records.cut_off(items):
        facts["cut off"] = f"{count} answers at the longest that was allowed"
    print_scores(task, arguments, answered, scores, facts)
    if all(one.failed for one in answered):
        raise ClientError(f"no item was answered; {failure}")


def facts_of(arguments: argparse.Namespace, answered: Sequence[Answered]) -> dict[str, str]:
    """Return what a reader of the scores must know, by name."""
    failed = sum(one.failed for one in answered)
    facts = {
        "model": arguments.model,
        "data": str(arguments.data),
        "items": f"{len(answered)}, of which {failed} failed and count as wrong",
    }
    if arguments.answers is None:
        facts["prompt"] = repr(arguments.prompt)
        facts["max tokens"] = str(arguments.max_tokens or "what is left of the context")
        facts["temperature"] = str(arguments.temperature)
    return facts


def print_scores(
    task: Task,
    arguments: argparse.Namespace,
    answered: Sequence[Answered],
    scores: Scores,
    facts: dict[str, str],
) -> None:
    failed = sum(one.failed for one in answered)
    text = markdown(scores, facts)
    result = {"task": task.name, "model": arguments.model, "items": len(answered), "failed": failed}
    result["scores"] = {f"{row.task}, {row.metric}": row.value for row in scores.rows}
    result |= {"report": scores.report} if scores.report else {}
    write_results(arguments.out, text, json_line(result))
    print(answer_text(text))
    print(json_line(result), flush=True)


async def asked_answers(
    task: Task, arguments: argparse.Namespace
) -> tuple[list[Answered], Records]:
    """Return the items with their answers, and all records. Asks what is not recorded yet."""
    async with ChatClient(arguments.url) as client:
        arguments.model = await choose_model(client, arguments.model)
        arguments.prompt = prompt_of(task, arguments)
        items = load_items(task, arguments)
        records = Records(arguments.out, settings_of(task, arguments), arguments.restart)
        records.check_inputs(items)
        asking = Asking(
            arguments.model, arguments.max_tokens, arguments.temperature, arguments.seed
        )
        with progress(records, items) as keep:
            await ask(client, records.unanswered(items), asking, arguments.concurrency, keep)
    return records.answers(items), records


def prompt_of(task: Task, arguments: argparse.Namespace) -> str:
    """Return the template that `--prompt` sets, or the task's for the model."""
    default = task.prompt(arguments.model)
    if arguments.prompt is None:
        return default
    if QUESTION in default and QUESTION not in arguments.prompt:
        raise ClientError(f"--prompt: the template needs {QUESTION}, where the question will stand")
    return str(arguments.prompt)


def load_items(task: Task, arguments: argparse.Namespace) -> list[Item]:
    """Return the items to ask about.

    Raises
    ------
    BadData
        If a data file is wrong, has no items or has two with the same id.
    """
    items = list(task.load(arguments))[: arguments.limit]
    if not items:
        raise BadData(f"{arguments.data}: expected at least one item")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise BadData(f"{arguments.data}: expected ids that differ, but {item.id} occurs twice")
        seen.add(item.id)
    return items


def settings_of(task: Task, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what must be the same when a run is continued."""
    common = {
        "task": task.name,
        "model": arguments.model,
        "data": str(arguments.data.resolve()),
        "prompt": arguments.prompt,
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
    }
    own = {name: getattr(arguments, name) for name in task.asked_by}
    return common | {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in own.items()
    }


@contextmanager
def progress(records: Records, items: Sequence[Item]) -> Iterator[Callable[[Record], None]]:
    """Show on stderr how many items are answered. Yields what keeps a record and counts it."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    failed = 0
    with Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        console=Console(stderr=True),
    ) as bar:
        done = len(items) - len(records.unanswered(items))
        line = bar.add_task("answered", total=len(items), completed=done, failed=0)

        def keep(record: Record) -> None:
            nonlocal failed
            failed += bool(record["error"])
            records.add(record)
            bar.update(line, advance=1, failed=failed)

        yield keep


def given_answers(task: Task, arguments: argparse.Namespace) -> tuple[list[Answered], Records]:
    """Return the items that `--answers` has an answer for, and a record of each."""
    arguments.model = str(arguments.answers)
    arguments.prompt = prompt_of(task, arguments)
    items = load_items(task, arguments)
    if arguments.answers.is_dir():
        given = read_folder(arguments.answers, items)
    else:
        given = read_answers(arguments.answers)
    items = [item for item in items if item.id in given]
    if not items:
        raise BadData(f"{arguments.answers}: expected answers to items of {arguments.data}")
    records = Records(arguments.out, settings_of(task, arguments), arguments.restart)
    for item in items:
        records.add(record_of(item, Answer(text=given[item.id])))
    return records.answers(items), records


def read_folder(folder: Path, items: Sequence[Item]) -> dict[str, str]:
    """Return the text of each file of a folder that is named as an item."""
    files = {item.id: folder / item.id for item in items}
    return {id: read_text(file) for id, file in files.items() if file.is_file()}


def read_answers(path: Path) -> dict[str, str]:
    """Return the answers of a file by item, those of failed requests left out."""
    if path.suffix == ".jsonl":
        rows = read_json_lines(path)
        pairs = [(row.get("id"), row.get("output")) for _, row in rows if not row.get("error")]
    else:
        content = read_json(path)
        pairs = list(content.items()) if isinstance(content, dict) else [(None, None)]
    for id, output in pairs:
        if not isinstance(id, str) or not isinstance(output, str):
            raise BadData(f"{path}: expected JSON {{ITEM: ANSWER}}, or records with id and output")
    return {id: output for id, output in pairs if isinstance(id, str) and isinstance(output, str)}


def write_results(folder: Path, table: str, result: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / TABLE, table)
        write(folder / RESULT, result + "\n")
    except OSError as error:
        raise ClientError(f"cannot write {folder}: {error.strerror}") from error
