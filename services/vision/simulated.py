"""A vision tower that only takes its time: for measuring and testing everything around it without its cost. Imports no torch."""

import hashlib
import math
import time

import numpy as np

from common.checkpoint import Checkpoint
from common.wire import Tensor

EMBEDDING_NAMES = ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight")
SAMPLED_ROWS = 2048


class SimulatedTower:
    """Each image takes `seconds`. Its embeddings are noise drawn from its pixels: equal for equal pixels, else different; of zero
    mean, and as widely spread as the language model's own token embeddings, so that the model answers each image differently."""

    def __init__(self, checkpoint: Checkpoint, seconds: float) -> None:
        self._seconds = seconds
        self._hidden_size: int = checkpoint.text_config["hidden_size"]
        self._merge_unit = checkpoint.vision_config.get("spatial_merge_size", 2) ** 2
        self._spread = spread_of_token_embeddings(checkpoint)

    def encode(self, patches: Tensor, grid_thw: tuple[int, int, int]) -> Tensor:
        """float32 [num_patches / merge_size ** 2, hidden_size]."""
        began = time.monotonic()
        seed = hashlib.blake2b(bytes(patches.data) + repr(grid_thw).encode(), digest_size=16).digest()
        noise = np.random.Generator(np.random.Philox(key=int.from_bytes(seed, "little")))
        shape = (math.prod(grid_thw) // self._merge_unit, self._hidden_size)
        embeddings = noise.standard_normal(shape, np.float32) * np.float32(self._spread)
        embeddings -= embeddings.mean()
        time.sleep(max(0.0, began + self._seconds - time.monotonic()))
        return Tensor.of(embeddings)


def spread_of_token_embeddings(checkpoint: Checkpoint) -> float:
    """Standard deviation, of the first rows."""
    info = next(checkpoint.tensors[name] for name in EMBEDDING_NAMES if name in checkpoint.tensors)
    kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[info.dtype]
    stored = np.memmap(info.file, kind, "r", info.offset, info.shape)[:SAMPLED_ROWS]
    if info.dtype == "BF16":  # the upper half of a float32
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return float(stored.astype(np.float32).std())
