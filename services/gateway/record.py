"""What the gateway knows of a request under way."""

import asyncio
import time
from dataclasses import dataclass, field

from common.errors import ServingError
from common.messages import Delta
from services.gateway.generation import Event, GenerationRequest


@dataclass(slots=True)
class Attempt:
    """One way of a request through the stages. `preprocess`, `detokenizer` and `llm` are the ids of those who hold it."""

    number: int
    preprocess: str
    detokenizer: str
    llm: str = ""
    early: list[Delta] = field(default_factory=list)
    """Came before Routed, by another connection."""
    is_answering: bool = False

    def depends_on(self, peer_id: str) -> bool:
        """Preprocess keeps the images until they are taken, which they all are when the first token is there."""
        return peer_id in (self.llm, self.detokenizer) or (peer_id == self.preprocess and not self.is_answering)


@dataclass(slots=True, eq=False)
class Record:
    """All that the gateway knows of a request under way: enough to begin it anew anywhere, after the tokens the client has."""

    request: GenerationRequest
    attempt: Attempt
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] = field(default_factory=list)
    events: asyncio.Queue[Event | ServingError] = field(default_factory=asyncio.Queue)
    admitted: float = field(default_factory=time.monotonic)
    first_token: float | None = None
