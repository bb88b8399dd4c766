"""What a client saw of a call, and the doors' errors under one name."""

from dataclasses import dataclass, field

# HTTP's codes as gRPC calls them; bodies of errors inside a stream tell their own.
BY_STATUS = {
    400: "INVALID_ARGUMENT",
    413: "INVALID_ARGUMENT",
    422: "INVALID_ARGUMENT",
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


class Told(Exception):
    """The system ended the call with an error."""

    def __init__(self, code: str, message: str, stage: str = "") -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.stage = stage


class HungUp(Exception):
    """The client has enough."""


@dataclass
class Answer:
    """Grows with what comes. `oddities` are what no client may ever see."""

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
    """How a call ended: answered, told (an error), hung_up, or nothing, where the client waited
    beyond all reason or the connection just ended."""

    how: str
    answer: Answer
    code: str = ""
    message: str = ""
    stage: str = ""
    seconds: float = 0.0
