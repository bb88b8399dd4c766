"""CUDA graphs: a computation recorded once and launched as a whole.

Each launch reads and writes the same memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UPS = 2
"""The runs before a capture.

In their first calls, libraries make handles, workspaces and connections, which no graph can hold.
"""


@dataclass(frozen=True, slots=True)
class Captured:
    """A captured computation."""

    replay: Callable[[], None]
    result: Tensor
    """The result of the last replay. The next replay of any graph in the pool overwrites it."""


class GraphPool:
    """Graphs that share the memory of their intermediate results.

    So they are replayed one after the other, never two at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, compute: Callable[[], Tensor]) -> Captured:
        """Record `compute`, which must never wait for the device.

        Tensors that it reads and does not make itself must live as long as the graph.
        """
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                compute()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local, so that other threads may use CUDA meanwhile: NCCL's watchdog queries its
        # events.
        try:
            with torch.cuda.graph(
                graph, self._pool, self._stream, capture_error_mode="thread_local"
            ):
                result = compute()
        finally:
            # torch stays on the stream of the capture if ending it fails.
            torch.cuda.set_stream(current)
        return Captured(graph.replay, result)
