"""What a client saw of a call, and one name for each error of the two APIs."""

from dataclasses import dataclass, field

# The names that gRPC has for statuses of HTTP, and for the codes of errors inside a stream.
BY_STATUS = {
    400: "INVALID_ARGUMENT",
    408: "INVALID_ARGUMENT",
    413: "INVALID_ARGUMENT",
    431: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
}
BY_STATUS |= {500: "INTERNAL", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED"}
BY_CODE = {
    "unavailable": "UNAVAILABLE",
    "deadline_exceeded": "DEADLINE_EXCEEDED",
    "internal_error": "INTERNAL",
}
BY_CODE |= {"rate_limit_exceeded": "RESOURCE_EXHAUSTED", "model_not_found": "NOT_FOUND"}


class CallFailed(Exception):
    """The system ended the call with an error."""

    def __init__(self, code: str, message: str, stage: str = "") -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.stage = stage


class HungUp(Exception):
    """The client hangs up before the end of the answer."""


@dataclass
class Answer:
    """The part of an answer received so far.

    `oddities` lists what no client may ever see.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reasons: list[str] = field(default_factory=list)
    num_completion_tokens: int | None = None
    oddities: list[str] = field(default_factory=list)

    def add(self, token_ids: list[int], text: str, offset: int | None = None) -> None:
        if self.finish_reasons:
            self.oddities.append("a piece after the end")
        if offset is not None and offset != len(self.token_ids):
            self.oddities.append(f"offset {offset} after {len(self.token_ids)} tokens")
        self.token_ids += token_ids
        self.text += text

    def end(self, finish_reason: str) -> None:
        if self.finish_reasons:
            self.oddities.append("a second end")
        self.finish_reasons.append(finish_reason)


@dataclass
class Outcome:
    """How a call ended.

    answered: with a whole answer
    error: with an error of the system
    hung_up: the client hung up
    nothing: the connection ended without a word, or the client gave up long after the deadline
    """

    how: str
    answer: Answer
    code: str = ""
    message: str = ""
    stage: str = ""
    seconds: float = 0.0
