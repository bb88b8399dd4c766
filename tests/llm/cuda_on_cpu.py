"""Stand-ins for what only CUDA has: the kernels of varlen_attn and FlashInfer as their contracts
say, and graphs that compute again at each replay."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType

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


class PlannedWrapper:
    """What both wrappers of FlashInfer have in common: they run what was planned last."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str) -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"
        self.num_plans = 0

    def keep(
        self,
        lens: Tensor,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        for given in (indptr, indices, last_page_len):
            assert given.dtype == torch.int32 and given.is_contiguous()
        assert q_data_type == kv_data_type
        assert len(lens) == len(last_page_len) == len(indptr) - 1
        assert indptr[0] == 0 and indptr[-1] == len(indices)
        assert ((last_page_len >= 1) & (last_page_len <= page_size)).all()
        assert (indptr.diff() >= 1).all(), "a sequence without a page"
        self.query_lens = lens
        self.heads = (num_qo_heads, num_kv_heads, head_dim)
        self.page_size = page_size
        self.dtype = q_data_type
        self.num_plans += 1

    def attend(
        self,
        q: Tensor,
        paged: tuple[Tensor, Tensor],
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
    ) -> Tensor:
        keys, values = paged
        assert self.num_plans, "run before plan"
        assert q.is_contiguous() and keys.is_contiguous() and values.is_contiguous()
        assert q.dtype == keys.dtype == self.dtype
        assert keys.shape[1:] == (self.page_size, *self.heads[1:])
        assert q.shape == (int(self.query_lens.sum()), self.heads[0], self.heads[2])
        out = []
        first = 0
        for i, query_len in enumerate(self.query_lens.tolist()):
            pages = indices[indptr[i] : indptr[i + 1]].long()
            used = (len(pages) - 1) * self.page_size + int(last_page_len[i])
            k, v = (x[pages].flatten(0, 1)[:used] for x in (keys, values))
            out.append(attend(q[first : first + query_len], k, v))
            first += query_len
        return torch.cat(out)


class Prefills(PlannedWrapper):
    """BatchPrefillWithPagedKVCacheWrapper without graphs."""

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert causal and qo_indptr.dtype == torch.int32 and qo_indptr[0] == 0
        self.pages = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        sizes = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self.keep(qo_indptr.diff(), *self.pages, *sizes, q_data_type, kv_data_type)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        return self.attend(q, paged_kv_cache, *self.pages)


class CapturedDecodes(PlannedWrapper):
    """BatchDecodeWithPagedKVCacheWrapper for graphs: a plan fills memory that a run reads."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str,
        *,
        use_cuda_graph: bool,
        use_tensor_cores: bool,
        paged_kv_indptr_buffer: Tensor,
        paged_kv_indices_buffer: Tensor,
        paged_kv_last_page_len_buffer: Tensor,
        backend: str,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        assert use_cuda_graph and use_tensor_cores and backend == "fa2"
        self.buffers = (
            paged_kv_indptr_buffer,
            paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer,
        )
        assert len(self.buffers[0]) == len(self.buffers[2]) + 1

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        for buffer, given in zip(self.buffers, (indptr, indices, last_page_len), strict=True):
            assert buffer.dtype == torch.int32 and len(given) <= len(buffer)
            buffer[: len(given)] = given
        assert len(last_page_len) == len(self.buffers[2]), "another batch than was captured"
        sizes = (num_qo_heads, num_kv_heads, head_dim, page_size)
        lens = torch.ones_like(last_page_len)
        self.keep(lens, indptr, indices, last_page_len, *sizes, q_data_type, kv_data_type)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        return self.attend(q, paged_kv_cache, *self.buffers)


class CopyEvent:
    """torch.cuda.Event that notes what was asked of it."""

    asked: list[str] = []

    def record(self) -> None:
        self.asked.append("record")

    def synchronize(self) -> None:
        self.asked.append("synchronize")


def flashinfer_stand_in() -> ModuleType:
    module = ModuleType("flashinfer")
    module.__spec__ = ModuleSpec("flashinfer", None)
    module.BatchPrefillWithPagedKVCacheWrapper = Prefills
    module.BatchDecodeWithPagedKVCacheWrapper = CapturedDecodes
    return module


def pretend(monkeypatch: pytest.MonkeyPatch) -> PagedAttentionCalls:
    calls = PagedAttentionCalls()
    monkeypatch.setattr("services.llm.attention_backends.by_varlen.kernel", lambda: calls)
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer_stand_in())
    monkeypatch.setattr("services.llm.attention_backends.by_flashinfer.WORKSPACE_BYTES", 1)
    monkeypatch.setattr(torch.cuda, "Event", CopyEvent)
    monkeypatch.setattr("services.llm.decode_graphs.GraphPool", ReplayedPool)
    monkeypatch.setattr("services.llm.attention_backends.trials.GraphPool", ReplayedPool)
    return calls
