"""Log-probabilities of the tokens of a prompt.

The logits of a token give the log-probability of the next one. So a request that asks for those of
its prompt has the logits of all its rows computed, a bounded number of rows in each step.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from services.llm.packing import upload
from services.llm.request import Request
from services.llm.scheduler import Chunk


def take_prompt_logits(chunks: Sequence[Chunk], logits: Tensor) -> Tensor:
    """Store what the logits of a step say about prompts, and return those of the other rows.

    `logits` are float32 [num_sampled, vocab_size], in the order of `StepPlan.sampled_rows`.
    """
    if not any(chunk.scored for chunk in chunks):
        return logits
    drawn = []
    row = 0
    for chunk in chunks:
        if scored := chunk.scored:
            score(chunk.request, scored, logits[row : row + len(scored)])
            row += len(scored)
        if chunk.samples:
            drawn.append(row)
            row += 1
    (rows,) = upload([np.array(drawn, np.int64)], logits.device)
    return logits[rows]


@torch.inference_mode()
def score(request: Request, positions: range, logits: Tensor) -> None:
    """Store the log-probabilities of the tokens that follow these positions of a prompt."""
    scores = request.prompt_scores
    assert scores is not None
    logprobs = logits.log_softmax(-1)
    next_ids = request.token_ids[positions.start + 1 : positions.stop + 1]
    # The placeholder of an item may lie outside the vocabulary. It is never drawn.
    is_known = (next_ids >= 0) & (next_ids < logits.shape[1])
    ids = torch.from_numpy(np.where(is_known, next_ids, 0)).to(logits.device)
    known = torch.from_numpy(is_known).to(logits.device)
    chosen = logprobs.gather(1, ids[:, None])[:, 0].where(known, -torch.inf)
    top = logprobs.topk(scores.top_token_ids.shape[1])
    span = slice(positions.start, positions.stop)
    scores.logprobs[span] = chosen.cpu().numpy()
    scores.ranks[span] = (logprobs > chosen[:, None]).sum(-1).add(1).cpu().numpy()
    scores.top_token_ids[span] = top.indices.cpu().numpy()
    scores.top_logprobs[span] = top.values.cpu().numpy()
    scores.num_done = positions.stop
