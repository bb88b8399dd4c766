"""What one step of the engine computes: made by the scheduler, executed by every rank. Imports no
torch."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass over a mixed batch of `num_seqs` sequences with `num_tokens` new tokens in
    all, in sequence order.

    A sequence of one new token is a decode (or the last token of a prefill); more are a chunk of
    its prompt.
    """

    token_ids: np.ndarray
    """int64 [num_tokens]; at placeholder positions the value is irrelevant, an embedding replaces
    it."""
    positions: np.ndarray
    """int64 [3, num_tokens]."""
    slot_mapping: np.ndarray
    """int64 [num_tokens]: block * block_size + offset, where the token's key and value are written.
    """
    query_lens: np.ndarray
    """int64 [num_seqs]: new tokens of each sequence, at least 1."""
    context_lens: np.ndarray
    """int64 [num_seqs]: tokens of each sequence in the KV cache after this step, the new ones
    included."""
    block_tables: np.ndarray
    """int64 [num_seqs, max_num_blocks]: each sequence's blocks in order, padded with 0."""
    embedding_rows: np.ndarray
    """int64 [num_embeddings]: rows of the batch whose input is an image embedding, in the order in
    which they are given."""
    sampled_rows: np.ndarray
    """int64 [num_sampled]: rows of the batch whose logits are wanted, in sequence order."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)
