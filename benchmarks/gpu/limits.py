"""What a card can do at most, measured: the bandwidth of its memory and the rate of products."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

DTYPE = torch.bfloat16
WARM_UPS = 3


@dataclass(frozen=True)
class Limits:
    bytes_per_second: float
    operations_per_second: float


def median_seconds(run: Callable[[], object], rounds: int) -> float:
    """Return the median time of a run, including all work that it starts on the device."""
    seconds = []
    for _ in range(WARM_UPS + rounds):
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UPS:])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_limits(
    device: torch.device, buffer_bytes: int, matrix_size: int, rounds: int
) -> Limits:
    """Measure the best rate of reading and of copying a large buffer, and of a large product.

    The values are random: products of zeros are faster.
    """
    buffer = torch.randn(buffer_bytes // 4, device=device)
    target = torch.empty_like(buffer)
    reading = buffer_bytes / median_seconds(buffer.sum, rounds)
    copying = 2 * buffer_bytes / median_seconds(lambda: target.copy_(buffer), rounds)
    a, b = torch.randn(2, matrix_size, matrix_size, device=device).to(DTYPE)
    operations = 2 * matrix_size**3
    return Limits(max(reading, copying), operations / median_seconds(lambda: a @ b, rounds))
