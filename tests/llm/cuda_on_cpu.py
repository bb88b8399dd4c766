"""Stand-ins for what only CUDA has: paged attention as its contract says, and graphs that compute
anew at each replay."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compute.cuda_graphs import Captured

CPU = torch.device("cpu")


class PagedAttentionCalls:
    """varlen_attn written out, for any dtype and page size; it holds the caller to the rest of what
    the kernel asks for."""

    def __init__(self) -> None:
        self.num_splits: list[int | None] = []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int],
        enable_gqa: bool,
        seqused_k: Tensor,
        block_table: Tensor,
        num_splits: int | None,
    ) -> Tensor:
        lens = cu_seq_q.diff().tolist()
        for given in (cu_seq_q, cu_seq_k, seqused_k, block_table):
            assert given.dtype == torch.int32 and given.is_contiguous()
        assert (
            cu_seq_q[0] == cu_seq_k[0] == 0
            and cu_seq_q[-1] == len(query)
            and cu_seq_k.diff().equal(seqused_k)
        )
        assert (
            max(lens) == max_q
            and seqused_k.max() <= max_k
            and block_table.shape[1] * key.shape[1] >= seqused_k.max()
        )
        assert query.stride(-1) == key.stride(-1) == 1 and enable_gqa
        assert window_size == ((-1, -1) if max_q == 1 else (-1, 0))
        assert num_splits == 1 or (max_q == 1 and query.shape[1] > key.shape[2]), (
            "a split that the kernel cannot join"
        )
        self.num_splits.append(num_splits)
        tables = [
            table[: -(-int(used) // key.shape[1])].long()
            for table, used in zip(block_table, seqused_k, strict=True)
        ]
        keys, values = (
            [pages[t].flatten(0, 1)[:n] for t, n in zip(tables, seqused_k, strict=True)]
            for pages in (key, value)
        )
        return torch.cat(
            [attend(*sequence) for sequence in zip(query.split(lens), keys, values, strict=True)]
        )


def attend(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor:
    """The last query sees all keys, each one before it a key less."""
    k, v = (x.repeat_interleave(q_THD.shape[1] // x.shape[1], 1) for x in (k_SKD, v_SKD))
    scores = torch.einsum("thd,shd->hts", q_THD, k) * q_THD.shape[-1] ** -0.5
    visible = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(k) - len(q_THD))
    return torch.einsum("hts,shd->thd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


class ReplayedPool:
    """A graph's result is overwritten whenever one of its pool is replayed."""

    def __init__(self, device: torch.device) -> None:
        self._results: list[Tensor] = []

    def capture(self, compute: Callable[[], Tensor]) -> Captured:
        result = compute().clone()
        self._results.append(result)

        def replay() -> None:
            for other in self._results:
                other.fill_(torch.nan)
            result.copy_(compute())

        return Captured(replay, result)


def pretend(monkeypatch: pytest.MonkeyPatch) -> PagedAttentionCalls:
    calls = PagedAttentionCalls()
    monkeypatch.setattr("services.llm.cuda_attention.varlen_attn", calls)
    monkeypatch.setattr("services.llm.decode_graphs.GraphPool", ReplayedPool)
    monkeypatch.setattr("services.llm.cuda_model_runner.objection_to_pages", lambda *_: "")
    return calls
