"""Which requests may have ended a member. Each of these suspects is retried apart from the others.

A request that is alone in a member when it dies is to blame, and no other one is. Otherwise every
request in work there is a suspect. Several answers to one request are one suspect, because they
have its prompt in common. `common/apart.py` has the agreement with the members.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from common.apart import MAX_DEATHS
from common.errors import Internal, ServingError
from common.events import PeerDown
from services.gateway.record import Attempt, Choices, Record

PASSED_TOKENS = 8
"""A request has passed the language group when an attempt has made this many tokens there. Fewer
may be those that a previous attempt had made already, without time to deliver them."""


@dataclass(frozen=True, slots=True)
class Loss:
    """An attempt that was lost with a member."""

    record: Record
    attempt: Attempt

    @property
    def num_tokens(self) -> int:
        """The number of tokens that the attempt had delivered."""
        return len(self.record.token_ids) - self.attempt.num_resumed

    def was_alone(self, down: PeerDown) -> bool:
        """Whether the member worked on nothing else.

        A detokenizer gets the tokens of nothing else if the language group computes nothing else.
        """
        member = self.attempt.llm if down.role == "detokenizer" else down.peer_id
        return member in self.attempt.alone_at


def assign_blame(losses: Iterable[Loss], down: PeerDown) -> list[Record]:
    """Count the death for the requests that may be its cause, mark them as apart, and return them.

    A request that is apart and waits for its turn was not in work.
    """
    losses = list(losses)
    blamed = {loss.record.choices for loss in losses if loss.was_alone(down)}
    for choices in blamed:
        choices.deaths[down.role] += 1
    if not blamed:
        by_request: dict[Choices, list[Loss]] = {}
        for loss in losses:
            by_request.setdefault(loss.record.choices, []).append(loss)
        blamed = {
            choices
            for choices, lost in by_request.items()
            if down.role not in choices.apart and is_suspect(choices, lost, down.role)
        }
    for choices in blamed:
        choices.apart.add(down.role)
    return [loss.record for loss in losses if loss.record.choices in blamed]


def is_suspect(choices: Choices, losses: list[Loss], role: str) -> bool:
    """Whether the member may have died of this request; counts the death if it was in work.

    A request that has just begun is a suspect. One that was answering becomes a suspect if it loses
    a second member without having passed the first: members are lost for other reasons, too, and
    then all answers go on at once.
    """
    deaths = choices.deaths
    num_tokens = max(loss.num_tokens for loss in losses)
    match role:
        case "preprocess" if not all(loss.attempt.llm for loss in losses):
            deaths[role] += 1
            return True
        case "llm" | "detokenizer":
            if num_tokens >= PASSED_TOKENS:
                deaths[role] = 0
            deaths[role] += 1
            return deaths[role] > 1 or (role == "llm" and not num_tokens)
    return False


def verdict(record: Record, down: PeerDown) -> ServingError | None:
    """Return the error of a request that was blamed for too many deaths."""
    if record.choices.deaths[down.role] < MAX_DEATHS:
        return None
    return Internal(
        f"{MAX_DEATHS} {down.role} processes in a row ended while they worked on this request, the "
        f"last one on this request alone, so it is not tried again: {down.reason}",
        stage=down.role,
    )


def acquit(record: Record, role: str) -> None:
    """Note that the request has passed the stage of this role."""
    record.choices.deaths.pop(role, None)
    record.choices.apart.discard(role)
