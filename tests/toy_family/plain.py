"""The toy model as plain loops: no cache, no batch, no chunks, float64, one sequence at a time."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tests.toy_family.checkpoint import (
    BLOCKS,
    HEAD_WIDTH,
    HEADS,
    KEY_HEADS,
    PATCH,
    PATCHES_PER_TOKEN,
)
from tests.toy_family.language import BASE, FIRST_COMPONENT_SHARE, NORM_EPS


class PlainModel:
    """Computes every token of a sequence anew for each new token."""

    def __init__(self, folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        self._weights = {
            name.removeprefix("toy."): tensor.double() for name, tensor in stored.items()
        }

    def generate(
        self,
        token_ids: list[int],
        positions: list[tuple[int, int]],
        items: dict[int, Tensor],
        rope_parameter: int,
        rope_delta: int,
        count: int,
    ) -> tuple[list[int], float]:
        """Return greedy tokens, and the smallest gap between the two best tokens of a step.

        `items` are the embeddings of the rows that stand for items.
        """
        ids = list(token_ids)
        places = list(positions)
        smallest_gap = math.inf
        while len(ids) < len(token_ids) + count:
            best = self.logits(ids, places, items, rope_parameter).topk(2)
            smallest_gap = min(smallest_gap, float(best.values[0] - best.values[1]))
            places.append((len(ids) + rope_delta, len(ids) + rope_delta))
            ids.append(int(best.indices[0]))
        return ids[len(token_ids) :], smallest_gap

    def embeddings(self, patches: Tensor, columns: int, content_size: tuple[int, int]) -> Tensor:
        """Return a picture's embeddings [num_tokens, width].

        `patches` are uint8 [num_patches, values] in raster order, `columns` of them in each row.
        """
        height, width = content_size
        look, mix, tell = (self._weights[f"eye.{name}"] for name in ("look", "mix", "tell"))
        seen = []
        for index, patch in enumerate(patches):
            pixels = patch.double().view(3, PATCH, PATCH) / 127.5 - 1
            row, column = divmod(index, columns)
            pixels[:, max(0, height - row * PATCH) :] = 0
            pixels[:, :, max(0, width - column * PATCH) :] = 0
            seen.append(look @ pixels.flatten())
        mixed = []
        for x in seen:
            weights = torch.stack([x @ mix @ other for other in seen]).softmax(0)
            mixed.append(x + sum(w * other for w, other in zip(weights, seen, strict=True)))
        n = PATCHES_PER_TOKEN
        return torch.stack([tell @ torch.cat(mixed[i : i + n]) for i in range(0, len(mixed), n)])

    def logits(
        self,
        ids: list[int],
        positions: list[tuple[int, int]],
        items: dict[int, Tensor],
        rope_parameter: int,
    ) -> Tensor:
        """Return the logits of the last token."""
        words = self._weights["stem.words"]
        rows = [items[row].double() if row in items else words[id] for row, id in enumerate(ids)]
        for block in range(BLOCKS):
            rows = self._block(f"block.{block}", rows, positions, items, rope_parameter)
        return self._weights["stem.out"] @ self._norm("stem.norm", rows[-1])

    def _block(
        self,
        name: str,
        rows: list[Tensor],
        positions: list[tuple[int, int]],
        items: dict[int, Tensor],
        rope_parameter: int,
    ) -> list[Tensor]:
        queries, keys, values = [], [], []
        for row, x in enumerate(rows):
            x = self._norm(f"{name}.norm_1", x)
            q, k, v = (self._project(name, part, "qkv", x, row in items) for part in "qkv")
            scale = 1 + 0.1 * math.log1p(positions[row][0])
            queries.append(scale * turned(q.view(HEADS, -1), positions[row], rope_parameter))
            keys.append(turned(k.view(KEY_HEADS, -1), positions[row], rope_parameter))
            values.append(v.view(KEY_HEADS, -1))
        made = []
        for row, x in enumerate(rows):
            is_item = row in items
            attended = attend(queries[row], keys[: row + 1], values[: row + 1])
            x = x + self._project(name, "o", "o", attended, is_item)
            h = self._norm(f"{name}.norm_2", x)
            gate = self._project(name, "gate", "mlp", h, is_item)
            up = self._project(name, "up", "mlp", h, is_item)
            made.append(x + self._project(name, "down", "down", F.silu(gate) * up, is_item))
        return made

    def _project(self, block: str, part: str, low: str, x: Tensor, is_item: bool) -> Tensor:
        y = self._weights[f"{block}.{part}"] @ x
        if is_item:
            low_rank = self._weights[f"{block}.{low}.low_down"] @ x
            y = y + self._weights[f"{block}.{part}.low_up"] @ low_rank
        return y

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean() + NORM_EPS).sqrt() * self._weights[name]


def turned(heads: Tensor, position: tuple[int, int], rope_parameter: int) -> Tensor:
    """Entry i of a head turns with entry i + half."""
    half = HEAD_WIDTH // 2
    components = [position[i >= FIRST_COMPONENT_SHARE] for i in range(half)]
    base = BASE * rope_parameter
    angles = [place * base ** -(2 * i / HEAD_WIDTH) for i, place in enumerate(components)]
    cos = torch.tensor(angles, dtype=heads.dtype).cos()
    sin = torch.tensor(angles, dtype=heads.dtype).sin()
    a = heads[:, :half]
    b = heads[:, half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), 1)


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query over all keys up to its own: [heads, head width] -> [heads * head width]."""
    k = torch.stack(keys)
    v = torch.stack(values)
    out = []
    for head in range(HEADS):
        kv = head * KEY_HEADS // HEADS
        weights = (k[:, kv] @ query[head] / math.sqrt(HEAD_WIDTH)).softmax(0)
        out.append(weights @ v[:, kv])
    return torch.cat(out)
