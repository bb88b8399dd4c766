"""A vision tower that only waits. It serves to measure and test everything around a tower.

It imports no torch.
"""

import hashlib
import math
import time

import numpy as np

from common.buckets import bucket_of
from common.checkpoint import Checkpoint
from common.wire import Tensor
from services.vision.tower_thread import ItemShape

SAMPLED_ROWS = 2048
"""The rows of the token embedding from which its spread is estimated."""
NOISE_LENGTH = 2**18


class SimulatedTower:
    """Waits, and returns noise that depends on the pixels alone.

    The noise has zero mean and the spread of the language model's own token embeddings, so that the
    model answers each image differently.
    """

    dtype = "float32"

    def __init__(
        self, checkpoint: Checkpoint, seconds: float, buckets: tuple[int, ...] = ()
    ) -> None:
        """Each item takes `seconds`.

        With buckets, the largest takes that long, and a smaller one its share.
        """
        self._seconds = seconds
        self._buckets = buckets
        self._hidden_size: int = checkpoint.sizes.hidden_size
        self._checkpoint = checkpoint
        self._spread = np.float32(spread_of_token_embeddings(checkpoint))
        self._noise = (
            np.random.default_rng(0).standard_normal(NOISE_LENGTH, np.float32)
            * self._spread
            / np.float32(math.sqrt(2))
        )

    def encode(self, patches: Tensor, shape: ItemShape) -> Tensor:
        """Return noise, float32 [num_tokens, hidden_size]."""
        began = time.monotonic()
        digest = hashlib.sha256(patches.data)  # the fastest hash on CPUs with SHA instructions
        digest.update(repr(shape.grid_thw).encode())
        num_patches = math.prod(shape.grid_thw)
        num_tokens = self._checkpoint.family.num_item_tokens(self._checkpoint, shape.grid_thw)
        embeddings = self._noise_of(digest.digest(), num_tokens * self._hidden_size)
        embeddings -= embeddings.mean()
        time.sleep(max(0.0, began + self.seconds_of(num_patches) - time.monotonic()))
        return Tensor.of(embeddings.reshape(num_tokens, self._hidden_size))

    def _noise_of(self, digest: bytes, count: int) -> np.ndarray:
        """Return `count` values: the sum of two parts of the stored noise, chosen by the digest.

        Drawing new values would take several times as long. It is done if the stored ones are too
        few.
        """
        if count > NOISE_LENGTH // 2:
            drawn = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
            return drawn.standard_normal(count, np.float32) * self._spread
        first, second = (
            int.from_bytes(digest[n : n + 8], "little") % (NOISE_LENGTH - count) for n in (0, 8)
        )
        return self._noise[first : first + count] + self._noise[second : second + count]

    def seconds_of(self, num_patches: int) -> float:
        """Return the time an item takes. Raises ValueError if it fits into no bucket."""
        if not self._buckets:
            return self._seconds
        if (bucket := bucket_of(num_patches, self._buckets)) == 0:
            raise ValueError(f"{num_patches} patches fit into none of the buckets {self._buckets}")
        return self._seconds * bucket / self._buckets[-1]


def spread_of_token_embeddings(checkpoint: Checkpoint) -> float:
    """Return the standard deviation of the token embedding's first rows."""
    family = checkpoint.family
    tensors = checkpoint.tensors.items()
    info = next(
        info for name, info in tensors if family.canonical_name(name) == family.embedding_name
    )
    kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[info.dtype]
    stored = np.memmap(info.file, kind, "r", info.offset, info.shape)[:SAMPLED_ROWS]
    if info.dtype == "BF16":  # a bfloat16 is the upper half of a float32
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return float(stored.astype(np.float32).std())
