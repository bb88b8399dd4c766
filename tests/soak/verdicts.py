"""What each outcome means, and how many there were of each."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.soak.answers import Answer, Outcome
from tests.soak.reference import Reference
from tests.soak.workload import POISONED_ROLES, Call, Question

REFUSALS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "NOT_FOUND")
ADMISSION_STAGE = "gateway"
MAX_EXAMPLES = 12


@dataclass
class Tally:
    """Counts of the outcomes.

    Each call counts once among answered, refused, late, cancelled, failed and lost. Besides that,
    duplicates, differing and near_ties count what was wrong with the answers received. Late calls
    had a deadline too short to be met. The counters failed and unwelcome (the refusals of good
    requests) are by cause.
    """

    calls: int = 0
    answered: int = 0
    refused: int = 0
    late: int = 0
    cancelled: int = 0
    lost: int = 0
    duplicates: int = 0
    differing: int = 0
    near_ties: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    unwelcome: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.duplicates or self.differing or self.failed or self.unwelcome)

    def count(self, call: Call, outcome: Outcome, references: Mapping[Question, Reference]) -> None:
        self.calls += 1
        for oddity in outcome.answer.oddities[:1]:
            self.duplicates += 1
            self._note(call, outcome, oddity)
        if not call.mistake:
            self._compare(call, outcome, references[call.question])
        match outcome.how:
            case "answered" if call.mistake:
                self._fail(call, outcome, f"{call.mistake} was answered")
            case "answered":
                self.answered += 1
                self.seconds.append(outcome.seconds)
            case "hung_up":
                self.cancelled += 1
            case "error":
                self._count_error(call, outcome)
            case _:
                self.lost += 1
                self._note(call, outcome, "lost")

    def _count_error(self, call: Call, outcome: Outcome) -> None:
        if call.manner == "hurried" and outcome.code == "DEADLINE_EXCEEDED":
            self.late += 1
        elif is_due(call, outcome):
            self.refused += 1
        elif outcome.code in REFUSALS or (
            outcome.code == "UNAVAILABLE" and outcome.stage == ADMISSION_STAGE
        ):
            self.refused += 1
            self.unwelcome[cause_of(outcome)] += 1
            self._note(call, outcome, "refused")
        else:
            self._fail(call, outcome, cause_of(outcome))

    def _fail(self, call: Call, outcome: Outcome, cause: str) -> None:
        self.failed[cause] += 1
        self._note(call, outcome, "failed")

    def _compare(self, call: Call, outcome: Outcome, reference: Reference) -> None:
        """Check that the part delivered is the beginning of the undisturbed answer."""
        match difference(outcome.answer, reference, is_whole=outcome.how == "answered"):
            case "tie":
                self.near_ties += 1
            case str(reason):
                self.differing += 1
                self._note(call, outcome, reason)

    def _note(self, call: Call, outcome: Outcome, what: str) -> None:
        if len(self.examples) < MAX_EXAMPLES:
            error = f"{outcome.code} {outcome.stage} {outcome.message}".strip()
            streamed = "streamed" if call.is_streamed else "whole"
            self.examples.append(
                f"call {call.number} ({call.api}, {streamed}, {call.manner}, "
                f"{len(call.question.pictures)} images,"
                f" {outcome.seconds:.1f} s): {what}; {error}"
            )


def is_due(call: Call, outcome: Outcome) -> bool:
    """Whether the refusal is right: the call was wrong, or its deadline could not be met."""
    expected = {
        "mistaken": ("INVALID_ARGUMENT", "NOT_FOUND"),
        "hurried": ("RESOURCE_EXHAUSTED",),
        "poison": ("INTERNAL",) if call.poison in POISONED_ROLES else REFUSALS,
    }
    return outcome.code in expected.get(call.manner, ())


def cause_of(outcome: Outcome) -> str:
    return f"{outcome.code} at {outcome.stage}" if outcome.stage else outcome.code


def difference(answer: Answer, reference: Reference, is_whole: bool) -> str | None:
    """Return None if the answer is the undisturbed one, "tie" if they part at a near tie.

    Otherwise return what is wrong.
    """
    found = answer.token_ids
    wanted = reference.token_ids
    parted = next(
        (n for n, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b),
        min(len(found), len(wanted)),
    )
    if reference.first_tie <= parted < min(len(found), len(wanted)):
        return "tie"
    if parted < len(found):
        return (
            f"token {parted} differs"
            if parted < len(wanted)
            else f"{len(found)} tokens, {len(wanted)} undisturbed"
        )
    if not reference.text.startswith(answer.text):
        return f"the text differs: {answer.text!r}, {reference.text!r} undisturbed"
    if not is_whole:
        return None
    whole = (found, answer.text, answer.finish_reasons, answer.num_completion_tokens)
    if whole != (wanted, reference.text, [reference.finish_reason], len(wanted)):
        return (
            f"the end differs: {len(found)} tokens, {answer.finish_reasons}, "
            f"counted {answer.num_completion_tokens}"
        )
    return None
