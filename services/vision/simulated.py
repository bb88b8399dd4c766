"""A vision tower that only takes its time: for measuring and testing everything around it without
its cost. Imports no torch."""

import hashlib
import math
import time

import numpy as np

from common.buckets import bucket_of
from common.checkpoint import Checkpoint
from common.wire import Tensor
from services.vision.tower_thread import ItemShape

SAMPLED_ROWS = 2048
NOISE_LENGTH = 2**18


class SimulatedTower:
    """Each image takes `seconds`; with buckets, the largest takes so long and the others their part
    of it. Its embeddings are noise drawn from its pixels: equal for equal pixels, else
    different; of zero mean, and as widely spread as the language model's own token embeddings,
    so that the model answers each image differently."""

    dtype = "float32"

    def __init__(
        self, checkpoint: Checkpoint, seconds: float, buckets: tuple[int, ...] = ()
    ) -> None:
        self._seconds = seconds
        self._buckets = buckets
        self._hidden_size: int = checkpoint.sizes.hidden_size
        self._patches_per_token = checkpoint.patches_per_token
        self._spread = np.float32(spread_of_token_embeddings(checkpoint))
        self._noise = (
            np.random.default_rng(0).standard_normal(NOISE_LENGTH, np.float32)
            * self._spread
            / np.float32(math.sqrt(2))
        )

    def encode(self, patches: Tensor, shape: ItemShape) -> Tensor:
        """float32 [num_patches / patches_per_token, hidden_size]."""
        began = time.monotonic()
        digest = hashlib.sha256(patches.data)  # the quickest there is, on processors that have it
        digest.update(repr(shape.grid_thw).encode())
        num_patches = math.prod(shape.grid_thw)
        num_tokens = num_patches // self._patches_per_token
        embeddings = self._noise_of(digest.digest(), num_tokens * self._hidden_size)
        embeddings -= embeddings.mean()
        time.sleep(max(0.0, began + self.seconds_of(num_patches) - time.monotonic()))
        return Tensor.of(embeddings.reshape(num_tokens, self._hidden_size))

    def _noise_of(self, digest: bytes, count: int) -> np.ndarray:
        """The sum of two parts of what was drawn once, which the digest chooses: drawing takes
        several times as long."""
        if count > NOISE_LENGTH // 2:
            drawn = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
            return drawn.standard_normal(count, np.float32) * self._spread
        first, second = (
            int.from_bytes(digest[n : n + 8], "little") % (NOISE_LENGTH - count) for n in (0, 8)
        )
        return self._noise[first : first + count] + self._noise[second : second + count]

    def seconds_of(self, num_patches: int) -> float:
        if not self._buckets:
            return self._seconds
        if (bucket := bucket_of(num_patches, self._buckets)) == 0:
            raise ValueError(f"{num_patches} patches fit into none of the buckets {self._buckets}")
        return self._seconds * bucket / self._buckets[-1]


def spread_of_token_embeddings(checkpoint: Checkpoint) -> float:
    """Standard deviation, of the first rows."""
    family = checkpoint.family
    tensors = checkpoint.tensors.items()
    info = next(
        info for name, info in tensors if family.canonical_name(name) == family.embedding_name
    )
    kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[info.dtype]
    stored = np.memmap(info.file, kind, "r", info.offset, info.shape)[:SAMPLED_ROWS]
    if info.dtype == "BF16":  # the upper half of a float32
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return float(stored.astype(np.float32).std())
