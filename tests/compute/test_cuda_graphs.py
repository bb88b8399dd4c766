"""What a capture leaves behind, with stand-ins for the streams and graphs of CUDA."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from compute.cuda_graphs import GraphPool

DEVICE = torch.device("cuda")


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


class Streams:
    """The current stream of a thread, and graphs whose captures may end badly."""

    def __init__(self) -> None:
        self.first = Stream()
        self.current = self.first
        self.ends_badly = False

    def set(self, stream: Stream) -> None:
        self.current = stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current
        self.set(stream)
        try:
            yield
        finally:
            self.set(before)

    @contextmanager
    def graph(
        self, graph: object, pool: object, stream: Stream, capture_error_mode: str
    ) -> Iterator[None]:
        """Do what torch.cuda.graph does: an error at the end leaves its stream the current one."""
        before = self.current
        self.set(stream)
        try:
            yield
        finally:
            if self.ends_badly:
                raise RuntimeError("the capture was invalidated")
            self.set(before)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    found = Streams()
    stand_ins = {
        "Stream": lambda device: Stream(),
        "graph_pool_handle": lambda: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "current_stream": lambda: found.current,
        "set_stream": found.set,
        "stream": found.stream,
        "graph": found.graph,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return found


def test_a_capture_returns_what_it_recorded(streams: Streams) -> None:
    result = torch.ones(1)
    assert GraphPool(DEVICE).capture(lambda: result).result is result
    assert streams.current is streams.first


@pytest.mark.parametrize("ends_badly", [False, True])
def test_a_capture_that_fails_leaves_the_stream_as_it_was(
    streams: Streams, ends_badly: bool
) -> None:
    """A thread that stayed on the stream of a capture would work next to all others."""
    streams.ends_badly = ends_badly
    calls: list[None] = []

    def compute() -> Tensor:
        calls.append(None)
        if len(calls) == 3:
            raise ValueError("it waits for the device")
        return torch.ones(1)

    with pytest.raises((RuntimeError, ValueError)) as caught:
        GraphPool(DEVICE).capture(compute)
    assert streams.current is streams.first
    first = caught.value.__context__ if ends_badly else caught.value
    assert str(first) == "it waits for the device"
