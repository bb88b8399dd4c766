"""CUDA graphs: a computation that is launched as one, from and to the same memory each time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class Captured:
    replay: Callable[[], None]
    result: Tensor
    """Overwritten by the next replay of any graph of the pool."""


class GraphPool:
    """Graphs that share the memory of what they compute: they are replayed one after the other,
    never two at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, compute: Callable[[], Tensor]) -> Captured:
        """`compute` must never wait for the device; what it reads and does not make itself must
        live as long as the graph."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # In their first calls libraries make what no graph can hold: handles, workspaces,
            # connections.
            for _ in range(WARM_UPS):
                compute()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile is no part of the graph and may go on: NCCL's watchdog
        # asks for its events.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = compute()
        return Captured(graph.replay, result)
