"""What `twinlens verify` needs of a reference implementation."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.commands.client import ClientError
from services.commands.verification.questions import Question


class PromptMismatch(Exception):
    """A served prompt has no place for what the reference makes of the images."""


@dataclass(frozen=True)
class PixelLimits:
    """The limits of a resized image that the system was started with; None for the model's own."""

    min_pixels: int | None = None
    max_pixels: int | None = None

    def check_unset(self, title: str) -> None:
        """Raise ClientError if a limit is set that a reference does not know."""
        if self != PixelLimits():
            raise ClientError(
                f"the reference of {title} resizes images as the model was published: start the "
                "system without --min-pixels and --max-pixels, and leave them out here"
            )


class ChatReference(ABC):
    """The reference of a model that writes."""

    title: str
    """What computes, and in which version."""
    max_images: int
    """The most images in a question."""

    @abstractmethod
    def prompt_ids(self, question: Question) -> list[int]:
        """Return the token ids of a question's prompt, with a placeholder for each embedding."""

    @abstractmethod
    def log_probs(
        self, question: Question, prompt_ids: Sequence[int], answer_ids: Sequence[int]
    ) -> np.ndarray:
        """Return the log-probabilities of each step of an answer, given the steps before it.

        Returns float32 [len(answer_ids), vocab_size]. Raises PromptMismatch.
        """


class PoolingReference(ABC):
    """The reference of a model that answers with a label or a vector."""

    title: str

    @abstractmethod
    def pool(self, question: Question) -> np.ndarray:
        """Return the log-probabilities of the labels, or a vector of length 1; float32 [n]."""


def answer_log_probs(logits: Tensor) -> np.ndarray:
    """float32 [n, vocab_size]: logits to log-probabilities."""
    return logits.log_softmax(-1).numpy()


def forced(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> tuple[Tensor, slice]:
    """Return what a decoder reads to predict every token of an answer, and where it does.

    The last token of the answer predicts nothing that was served.
    """
    ids = torch.tensor([*prompt_ids, *answer_ids[:-1]])
    return ids, slice(len(prompt_ids) - 1, len(ids))


def placed(rows: Tensor, items: Tensor, is_item: Tensor) -> Tensor:
    """Return embeddings with those of items in the place of placeholders.

    `rows` is [n, width], `items` [m, width], `is_item` bool [n]. Raises PromptMismatch unless there
    are m placeholders.
    """
    if (found := int(is_item.sum())) != len(items):
        raise PromptMismatch(
            f"the prompt has {found} placeholders for images, the reference makes {len(items)} "
            "embeddings of them"
        )
    rows = rows.clone()
    rows[is_item] = items
    return rows
