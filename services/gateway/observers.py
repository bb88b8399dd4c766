"""Observers: what `MeasuredCore` notifies of every request that reaches the core."""

from typing import Protocol

from common.errors import ServingError
from services.gateway.generation import GenerationEvent, GenerationRequest

ABORTED = "aborted"
"""The outcome of a request that its client left before the end."""
POOLED = "pooled"
"""The outcome of a request that asked for no text and has its result."""
CONVERTED = "converted"
"""The outcome of a request for the tokens of a prompt, or for the text of tokens."""


class Observation(Protocol):
    """What an observer does with one admitted request.

    All methods run on the event loop, between the events of the answer: they must be quick and must
    not raise.
    """

    def on_event(self, event: GenerationEvent) -> None:
        """Note an event, before the API server gets it."""
        ...

    def on_end(self, outcome: str, error: ServingError | None) -> None:
        """Note the end of the request. Nothing follows.

        Parameters
        ----------
        outcome
            the finish reason of an answer, POOLED, CONVERTED, ABORTED, or the code of `error`.
        error
            why the request failed, at the core or while its answer was written; None otherwise.
        """
        ...


class RequestObserver(Protocol):
    """What wants to see the requests. Its methods are as quick as those of an Observation."""

    def begin(self, request: GenerationRequest, arrival: float) -> Observation:
        """Return what observes a request that was just admitted.

        `arrival` is the time on the monotonic clock at which the request reached the core.
        """
        ...

    def on_refused(self, request: GenerationRequest, arrival: float, error: ServingError) -> None:
        """Note a request that was not admitted."""
        ...
