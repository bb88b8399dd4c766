"""How large everything is that `scripts/gpu` measures: on a card, and in a dry run on the CPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    device: str
    dtype: str
    checkpoint: str
    """A recipe of `benchmarks.families`."""
    rounds: int
    """The timed runs of each case."""
    buffer_bytes: int
    matrix_size: int
    """Buffer and matrices by which the limits are measured."""
    decode_context: int
    decodes: dict[int, float]
    """The wanted share of the memory bandwidth, by the number of sequences."""
    prefills: dict[int, float]
    """The wanted share of the matrix rate, by the number of tokens."""
    pictures: dict[tuple[int, int], float]
    """The wanted share of the matrix rate, by width and height."""
    overhead: float
    """The wanted share of a decode step that is not the forward pass, at the largest batch."""
    served_picture: tuple[int, int]
    served_tokens: int
    """The length of an answer."""
    clients: tuple[int, ...]
    requests_per_client: int
    wanted_ttft_ms: float
    """With one client."""


CARD = Sizes(
    device="cuda",
    dtype="bfloat16",
    checkpoint="7b",
    rounds=20,
    buffer_bytes=4 << 30,
    matrix_size=8192,
    decode_context=512,
    decodes={1: 0.80, 32: 0.65},
    prefills={1024: 0.60, 4096: 0.60},
    pictures={(448, 448): 0.60, (1288, 728): 0.60},
    overhead=0.05,
    served_picture=(1288, 728),
    served_tokens=64,
    clients=(1, 8, 32),
    requests_per_client=4,
    wanted_ttft_ms=90.0,
)
DRY = Sizes(
    device="cpu",
    dtype="float32",
    checkpoint="plumbing",
    rounds=2,
    buffer_bytes=1 << 20,
    matrix_size=64,
    decode_context=20,
    decodes={1: 0.80, 3: 0.65},
    prefills={8: 0.60, 24: 0.60},
    pictures={(56, 56): 0.60, (112, 56): 0.60},
    overhead=0.05,
    served_picture=(112, 84),
    served_tokens=4,
    clients=(1, 2),
    requests_per_client=2,
    wanted_ttft_ms=90.0,
)
