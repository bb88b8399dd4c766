"""What one step computes: made by the scheduler, executed by every rank. Imports no torch."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass over `num_tokens` new tokens of `num_seqs` sequences, in sequence order.

    A sequence of one new token is a decode, or the last token of a prefill. A sequence of several
    new tokens is a chunk of its prompt.
    """

    token_ids: np.ndarray
    """int64 [num_tokens]. At a placeholder the value is irrelevant: an embedding replaces it."""
    positions: np.ndarray
    """int64 [num_components, num_tokens]."""
    slot_mapping: np.ndarray
    """int64 [num_tokens]: block * block_size + offset, where the token's key and value go."""
    query_lens: np.ndarray
    """int64 [num_seqs]: new tokens of each sequence, at least 1."""
    context_lens: np.ndarray
    """int64 [num_seqs]: tokens of each sequence in the KV cache after this step."""
    block_tables: np.ndarray
    """int64 [num_seqs, max_num_blocks]: the blocks of each sequence in order, padded with 0."""
    item_rows: np.ndarray
    """int64 [num_embeddings]: rows of the batch whose input is an item's embedding, in the order in
    which the embeddings are given."""
    sampled_rows: np.ndarray
    """int64 [num_sampled]: rows of the batch whose logits are wanted, in rising order."""
    rope_parameters: np.ndarray
    """int64 [num_seqs]: the rope parameter of each sequence; 0 if its family has none."""
    adapters: np.ndarray
    """int64 [num_seqs]: the adapter of each sequence; 0 for none."""
    block_copies: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """int64 [num_copies, 2]: blocks of the KV cache whose content is copied before anything else,
    and the blocks to which it is copied."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)
