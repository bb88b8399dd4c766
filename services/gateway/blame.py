"""Which requests may have ended a member. Each of these suspects is retried apart from the others.

A request that is alone in a member when it dies is to blame, and no other one is. Otherwise every
request in work there is a suspect. `common/apart.py` has the agreement with the members.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from common.apart import MAX_DEATHS
from common.errors import Internal, ServingError
from common.events import PeerDown
from services.gateway.record import Attempt, Record

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
    blamed = [loss.record for loss in losses if loss.was_alone(down)]
    if blamed:
        for record in blamed:
            record.deaths[down.role] += 1
    else:
        blamed = [
            loss.record
            for loss in losses
            if down.role not in loss.record.apart and is_suspect(loss, down.role)
        ]
    for record in blamed:
        record.apart.add(down.role)
    return blamed


def is_suspect(loss: Loss, role: str) -> bool:
    """Whether the member may have died of this request; counts the death if it was in work.

    A request that has just begun is a suspect. One that was answering becomes a suspect if it loses
    a second member without having passed the first: members are lost for other reasons, too, and
    then all answers go on at once.
    """
    deaths = loss.record.deaths
    match role:
        case "preprocess" if not loss.attempt.llm:
            deaths[role] += 1
            return True
        case "llm" | "detokenizer":
            if loss.num_tokens >= PASSED_TOKENS:
                deaths[role] = 0
            deaths[role] += 1
            return deaths[role] > 1 or (role == "llm" and not loss.num_tokens)
    return False


def verdict(record: Record, down: PeerDown) -> ServingError | None:
    """Return the error of a request that was blamed for too many deaths."""
    if record.deaths[down.role] < MAX_DEATHS:
        return None
    return Internal(
        f"{MAX_DEATHS} {down.role} processes in a row ended while they worked on this request, the "
        f"last one on this request alone, so it is not tried again: {down.reason}",
        stage=down.role,
    )


def acquit(record: Record, role: str) -> None:
    """Note that the request has passed the stage of this role."""
    record.deaths.pop(role, None)
    record.apart.discard(role)
