"""The inner loop of a group whose model computes one vector of each prompt, and no text."""

import time

import torch

from services.llm.engine import Engine, Output
from services.llm.guided_decoding import Mask
from services.llm.request import Request
from services.llm.scheduler import Chunk


class PoolingEngine(Engine):
    """Owns the requests of the group. Each takes one step and ends with it."""

    item_dtypes = ("uint8",)
    pools = True

    def _register(self, request: Request) -> None:
        """Hold room for the item. Nothing is sampled."""
        if request.placeholders:
            self.budget.add(
                request.key, request.num_item_tokens, request.preprocess_id, request.priority
            )

    def _outputs_of(
        self, chunks: list[Chunk], values: torch.Tensor, masks: dict[int, Mask]
    ) -> list[Output]:
        """End the requests of a step, of which `values` has a row each: float32 [n, width]."""
        now = time.monotonic()
        rows = values.cpu().numpy()
        is_finite = values.isfinite().all(-1).tolist()
        outputs = []
        for row, request in enumerate(chunk.request for chunk in chunks):
            request.first_token = now
            error = "" if is_finite[row] else "the model's values for this prompt are not finite"
            self._end(request.key, error)
            outputs.append(Output(request, 0, [], "stop", error, values=rows[row]))
        return outputs
