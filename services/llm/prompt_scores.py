"""What is known about the tokens of a prompt so far. Imports no torch."""

from dataclasses import dataclass

import numpy as np

from common.messages import MAX_PROMPT_LOGPROBS, Prompt
from common.wire import Tensor


@dataclass(slots=True, eq=False)
class PromptScores:
    """Log-probabilities of the tokens of a prompt but the first, as far as they are computed.

    They are those of the model's own distribution, before penalties and temperature.
    """

    logprobs: np.ndarray
    """float32 [p - 1]."""
    ranks: np.ndarray
    """int64 [p - 1]: 1 for the most likely token."""
    top_token_ids: np.ndarray
    """int64 [p - 1, k], most likely first."""
    top_logprobs: np.ndarray
    """float32 [p - 1, k]."""
    num_done: int = 0
    """How many are computed, from the first on."""

    @classmethod
    def of(cls, prompt: Prompt) -> "PromptScores | None":
        """Return what a prompt asks for; None if it asks for nothing.

        An attempt that continues an answer computes nothing: the first one has delivered it.
        """
        k = prompt.sampling.num_prompt_logprobs
        if k is None or prompt.output_token_ids or prompt.task != "generate":
            return None
        count = prompt.token_ids.shape[0] - 1
        return cls(
            np.zeros(count, np.float32),
            np.zeros(count, np.int64),
            np.zeros((count, k), np.int64),
            np.zeros((count, k), np.float32),
        )

    @property
    def is_complete(self) -> bool:
        return self.num_done == len(self.logprobs)

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields of Start that hold them."""
        return {
            "prompt_logprobs": Tensor.of(self.logprobs),
            "prompt_ranks": Tensor.of(self.ranks),
            "prompt_top_token_ids": Tensor.of(self.top_token_ids),
            "prompt_top_logprobs": Tensor.of(self.top_logprobs),
        }


def objection_to_scores(prompt: Prompt) -> str:
    """Return why the log-probabilities of a prompt are not computed; "" if they can be."""
    k = prompt.sampling.num_prompt_logprobs
    if k is None or prompt.task != "generate":
        return ""
    if prompt.whole:
        return "a prompt that is computed in one step has no log-probabilities"
    if prompt.token_ids.shape[0] * (k + 1) > MAX_PROMPT_LOGPROBS:
        return f"prompt_logprobs are more than {MAX_PROMPT_LOGPROBS}"
    return ""
