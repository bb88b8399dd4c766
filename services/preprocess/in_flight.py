"""What preprocess holds of a request in flight."""

from dataclasses import dataclass, field

import numpy as np

from common.messages import ItemKey, Peer, RequestKey, Submit
from common.tracing import (
    ATTEMPT,
    ITEM,
    ITEM_KIND,
    NO_SPAN,
    NUM_PATCHES,
    Attributes,
    Span,
    Tracing,
)
from common.wire import Tensor
from services.preprocess.prepared import PreparedItem, ReadyItem
from services.preprocess.sandbox.pool import Task

MISSING_SECONDS = 60.0
"""How long work waits for a replica or language group to come back: as long as a restart takes."""


@dataclass(slots=True, eq=False)
class Preparation:
    """A request whose prompt was not yet handed to a language group."""

    submit: Submit
    gateway_id: str
    received: float
    task: Task | None = None
    """What a sandbox does, or must do, for the request now."""
    token_ids: np.ndarray | None = None
    grammar: Tensor | None = None
    bad_words: Tensor | None = None
    """The `bad_words` of its Prompt's token rules."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Height and width of each item, by its header."""
    num_images: tuple[int, ...] = ()
    """How many images of its size each item costs."""
    items: list[ReadyItem] = field(default_factory=list)
    item_seconds: list[float] = field(default_factory=list)
    span: Span = NO_SPAN

    @property
    def key(self) -> RequestKey:
        return self.submit.key

    @property
    def priority(self) -> int:
        return self.submit.priority

    @property
    def sibling_keys(self) -> tuple[RequestKey, ...]:
        """The other answers to the prompt."""
        return tuple((other.request_id, self.submit.attempt) for other in self.submit.siblings)

    @property
    def deadline(self) -> float:
        return self.received + self.submit.timeout

    @property
    def needs_item(self) -> bool:
        """Whether an item still has to be prepared."""
        return len(self.items) < len(self.submit.items)

    @property
    def is_prepared(self) -> bool:
        return self.token_ids is not None and not self.needs_item


@dataclass(slots=True, eq=False)
class PendingItem:
    """An item of a request that was handed over, until the language group has its embeddings.

    It waits for a replica while `vision_id` is empty. It is offered once `vision_id` is set, and in
    the replica's hands once `is_accepted`. docs/architecture.md draws these states.
    """

    key: ItemKey
    prepared: PreparedItem
    vision_id: str = ""
    is_accepted: bool = False
    """The replica got the pixels or needs none: from now on it is responsible for the item."""
    has_pixels: bool = False
    """The replica was sent the pixels."""
    num_failures: int = 0
    """How often a replica or the language group reported that the item failed."""
    num_deaths: int = 0
    """How many replicas died while they worked on the item."""
    failed_at: set[str] = field(default_factory=set)
    has_passed: bool = False
    """The replica has finished with the item, as far as its death could be the item's fault."""
    skip_cache: bool = False
    expected_seconds: float = 0.0
    """Expected seconds in the tower, set while the item waits."""
    span: Span = NO_SPAN
    """The span of the last offer, until that comes to something."""
    priority: int = 0
    """Items with lower values are offered first."""

    def begin_span(self, tracing: Tracing, parent: str) -> None:
        """Begin the span of an offer to `vision_id`. That of an offer that came to nothing is
        dropped."""
        if not parent:
            return
        _, attempt, index = self.key
        attributes: Attributes = {
            ATTEMPT: attempt,
            ITEM: index,
            ITEM_KIND: self.prepared.kind,
            NUM_PATCHES: self.prepared.num_patches,
            "twinlens.vision": self.vision_id,
            "twinlens.item.num_lost": self.num_failures + self.num_deaths,
        }
        name = f"dispatch {self.prepared.kind}"
        self.span = tracing.begin(name, parent, None, attributes, "producer")

    def end_span(self, error: str = "") -> None:
        """End the span of the last offer, unless it has ended. With an error it has failed."""
        self.span.end(error=error)
        self.span = NO_SPAN

    @property
    def is_apart(self) -> bool:
        """Whether a replica must work on the item alone, because one has died of it, perhaps."""
        return self.num_deaths > 0

    @property
    def is_suspect(self) -> bool:
        """Whether its replica works on the item, so that its death may be the item's fault."""
        return self.is_accepted and not self.has_passed


@dataclass(slots=True)
class Handover:
    """A request whose prompt a language group has, while embeddings are still to come."""

    gateway_id: str
    llm: Peer
    deadline: float
    items: dict[int, PendingItem] = field(default_factory=dict)
    is_reserved: bool = False
    """Whether the group has reserved room for the embeddings of all items."""
    traceparent: str = ""
    siblings: tuple[RequestKey, ...] = ()
    """The other answers to the prompt, which need its items, too."""


@dataclass(frozen=True, slots=True)
class SentPrompt:
    """A prompt without items. No message confirms its arrival."""

    when: float
    key: RequestKey
    gateway_id: str
    llm_id: str
