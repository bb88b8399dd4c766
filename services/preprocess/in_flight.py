"""What preprocess holds of a request under way."""

from dataclasses import dataclass, field

import numpy as np

from common.messages import Peer, Submit
from common.wire import Tensor
from services.preprocess.families.qwen2_5_vl import Image

MISSING_SECONDS = 60.0
"""For a replica or a language group to come back after the last one was lost: as long as a restart
may take."""

Key = tuple[str, int]
"""(request_id, attempt)."""
ImageKey = tuple[str, int, int]
"""(request_id, attempt, image)."""


@dataclass(slots=True)
class Preparation:
    """A request whose prompt is not handed to the language group yet."""

    submit: Submit
    gateway_id: str
    received: float
    token_ids: np.ndarray | None = None
    grammar: Tensor | None = None
    images: list[Image] = field(default_factory=list)
    image_seconds: list[float] = field(default_factory=list)

    @property
    def deadline(self) -> float:
        return self.received + self.submit.timeout

    @property
    def needs_image(self) -> bool:
        return len(self.images) < len(self.submit.images)

    @property
    def is_prepared(self) -> bool:
        return self.token_ids is not None and not self.needs_image


@dataclass(slots=True, eq=False)
class PendingItem:
    """An image of a request that was handed over. Without a `vision_id` it waits for a replica."""

    key: ImageKey
    image: Image
    vision_id: str = ""
    has_pixels: bool = False
    """The replica was sent them, or said that it needs none: what becomes of the image there is its
    doing."""
    dispatches: int = 0
    """Replicas that failed with it in hand, and the one that has it in hand."""
    failed_at: set[str] = field(default_factory=set)
    skip_cache: bool = False
    expected_seconds: float = 0.0
    """In the tower, while it waits."""


@dataclass(slots=True)
class Handover:
    """A request whose prompt the language group has, while embeddings are still to come."""

    gateway_id: str
    llm: Peer
    deadline: float
    images: dict[int, PendingItem] = field(default_factory=dict)
    is_reserved: bool = False
    """The group has room for the embeddings of all of its images."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A prompt without images: nothing comes back that would confirm its arrival."""

    when: float
    key: Key
    gateway_id: str
    llm_id: str
