"""MMBench: questions with options, asked several times with the options rotated.

Liu et al., "MMBench: is your multi-modal model an all-around player?" In its circular evaluation a
question is right only if every pass is answered rightly.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from services.commands.evaluation.choices import (
    CHOICE,
    Options,
    ask_for_option,
    chosen_option,
    options_of,
)
from services.commands.evaluation.data import BadData
from services.commands.evaluation.prompts import by_family
from services.commands.evaluation.task import Answered, Item, Row, Scores, Task, mean
from services.commands.evaluation.tsv import TsvRow, read_tsv

PASS = 1_000_000
"""The passes of a question have indices that are equal modulo this number."""


@dataclass(frozen=True)
class Choice:
    """One pass of a question."""

    index: int
    options: Options
    answer: str
    """The letter of the right option."""
    groups: tuple[str, ...]
    """The categories of the question, the broad one first."""

    @property
    def question(self) -> int:
        return self.index % PASS


def load(arguments: argparse.Namespace) -> list[Item]:
    """Return all passes, those of a question one after another."""
    items = []
    for row, images in read_tsv(arguments.data):
        choice = choice_of(row)
        text = ask_for_option(
            arguments.prompt, row.take("question"), choice.options, row.values.get("hint", "")
        )
        items.append(Item(str(choice.index), (*images, text), choice))
    return sorted(items, key=lambda item: (item.target.question, item.target.index))


def choice_of(row: TsvRow) -> Choice:
    index = row.take("index")
    if not index.isdigit():
        raise BadData(f'{row.place}: expected a whole number in column "index"')
    options = options_of(row.values)
    answer = row.take("answer")
    if answer not in options:
        raise BadData(f"{row.place}: expected the letter of an option as the answer")
    groups = [row.values[name] for name in ("l2-category", "category") if name in row.values]
    return Choice(int(index), options, answer, tuple(groups))


def score(answered: Sequence[Answered], arguments: argparse.Namespace) -> Scores:
    parts = []
    passes: dict[int, list[bool]] = {}
    groups: dict[int, tuple[str, ...]] = {}
    for one in answered:
        choice: Choice = one.item.target
        chosen = "" if one.failed else chosen_option(one.output, choice.options)
        right = chosen == choice.answer
        passes.setdefault(choice.question, []).append(right)
        groups[choice.question] = choice.groups
        parts.append({"chosen": chosen, "right": int(right)})
    circular = {question: all(rights) for question, rights in passes.items()}
    first = [rights[0] for rights in passes.values()]
    rows = [
        row("mmbench", "acc (circular)", list(circular.values())),
        row("mmbench", "acc (first pass)", first),
        row("mmbench", "acc (all passes)", [bool(part["right"]) for part in parts]),
    ]
    for depth in range(max(map(len, groups.values()))):
        names = sorted({own[depth] for own in groups.values() if depth < len(own)})
        for name in names:
            own = [hit for question, hit in circular.items() if name in groups[question][depth:]]
            rows.append(row(name, "acc (circular)", own))
    return Scores(rows, parts)


def row(task: str, metric: str, rights: Sequence[bool]) -> Row:
    return Row(task, len(rights), sum(rights), metric, mean(rights))


MMBENCH = Task(
    name="mmbench",
    help="MMBench: questions with options, in circular evaluation with exact matching",
    data="MMBench_DEV_EN.tsv or MMBench_DEV_CN.tsv of VLMEvalKit, or another in this format",
    prompt=by_family(CHOICE),
    load=load,
    score=score,
    max_tokens=512,
)
