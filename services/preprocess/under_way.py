"""What preprocess holds of a request under way."""

import time
from dataclasses import dataclass, field

import numpy as np

from common.messages import Peer, Submit
from common.wire import Tensor
from services.preprocess.families.qwen2_5_vl import Image

Key = tuple[str, int]


@dataclass(slots=True)
class Preparation:
    """A request whose prompt is not handed to the language group yet."""

    submit: Submit
    gateway_id: str
    received: float = field(default_factory=time.monotonic)
    token_ids: np.ndarray | None = None
    grammar: Tensor | None = None
    images: list[Image] = field(default_factory=list)
    image_seconds: list[float] = field(default_factory=list)

    @property
    def deadline(self) -> float:
        return self.received + self.submit.timeout


@dataclass(slots=True)
class Dispatched:
    """An image that a vision replica has in hand."""

    image: Image
    vision_id: str
    dispatches: int = 1


@dataclass(slots=True)
class Handover:
    """A request whose prompt the language group has, while embeddings are still to come."""

    gateway_id: str
    llm: Peer
    deadline: float
    images: dict[int, Dispatched] = field(default_factory=dict)
