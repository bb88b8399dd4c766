"""Qwen2.5-VL and RolmOCR: images and videos to patches, and M-RoPE positions."""

import math
from typing import Any

import numpy as np

from common.checkpoint import Checkpoint
from common.errors import InvalidRequest, TooLarge
from common.families import qwen2_5_vl as family_rules
from common.families.qwen2_5_vl import MAX_ASPECT_RATIO
from common.item_hash import item_hash
from common.messages import ItemKind
from common.pixel_bounds import NO_BOUNDS, PixelBounds
from services.preprocess.families.limits import ItemLimits
from services.preprocess.families.patches import patches
from services.preprocess.prepared import PreparedItem, ReadyItem


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return the (height, width) to resize to.

    They are multiples of `factor`, keep to the limits of area, and have about the same aspect
    ratio.

    Raises
    ------
    InvalidRequest
        if one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InvalidRequest(
            f"the image is {width}x{height}: one side may be at most {MAX_ASPECT_RATIO} times the "
            "other"
        )
    # Python rounds halves to even here, and the division by `factor` comes last. Both decide single
    # cases.
    rows = round(height / factor)
    columns = round(width / factor)
    if rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    # Rounding up may exceed the upper limit, if both are close to each other.
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    return rows * factor, columns * factor


def video_patches(
    frames: np.ndarray, patch_size: int, merge_size: int, frames_per_step: int
) -> np.ndarray:
    """Cut uint8 [num_frames, height, width, 3] into uint8 [num_patches, values].

    Steps follow each other, and the patches of one are ordered as those of an image. The values of
    a patch are ordered by (channel, frame, y, x). The last frame is repeated to fill the last step.
    """
    if missing := -len(frames) % frames_per_step:
        frames = np.concatenate([frames, frames[-1:].repeat(missing, axis=0)])
    height, width = (side // patch_size // merge_size for side in frames.shape[1:3])
    cells = frames.reshape(
        -1, frames_per_step, height, merge_size, patch_size, width, merge_size, patch_size, 3
    )
    rows = np.ascontiguousarray(cells.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7))
    return rows.reshape(-1, 3 * frames_per_step * patch_size * patch_size)


class Qwen25VLRules:
    """The rules of Qwen2.5-VL for one checkpoint. They do not change."""

    whole = False
    chat_prompt = None
    fit_prompt = None

    def __init__(self, checkpoint: Checkpoint, limits: ItemLimits) -> None:
        """Read the checkpoint's settings. Raises ValueError if the limits cannot be kept."""
        self.fingerprint = checkpoint.fingerprint
        self.patch_size, self.merge_size = patch_sizes(checkpoint)
        self.tokens_per_second = family_rules.tokens_per_second(checkpoint.vision_config)
        self.min_pixels, self.max_pixels = pixel_limits(
            checkpoint.preprocessor_config, limits, self.factor
        )
        self.resizes_oversized = limits.resizes_oversized

    @property
    def factor(self) -> int:
        """The sides of a resized image are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    def fitting_size(
        self, height: int, width: int, max_patches: int, bounds: PixelBounds = NO_BOUNDS
    ) -> tuple[int, int]:
        low, high = bounds.within(self.min_pixels, self.max_pixels)
        rows, columns = smart_resize(height, width, self.factor, low, high)
        if not max_patches or self.num_patches(rows, columns) <= max_patches:
            return rows, columns
        largest = max_patches * self.patch_size**2
        if self.resizes_oversized and largest >= self.min_pixels:
            low = min(low, largest)
            rows, columns = smart_resize(height, width, self.factor, low, largest)
        if self.num_patches(rows, columns) > max_patches:
            raise TooLarge(
                f"it has {self.num_patches(rows, columns)} patches, the vision replicas take at "
                f"most {max_patches}: send it smaller"
            )
        return rows, columns

    def num_patches(self, height: int, width: int) -> int:
        """Return the number of patches of a resized image."""
        return height * width // self.patch_size**2

    def num_tokens(self, height: int, width: int) -> int:
        return height * width // self.factor**2

    def prepare_item(self, kind: ItemKind, pixels: np.ndarray) -> ReadyItem:
        height, width, _ = pixels.shape
        rows = patches(pixels, self.patch_size, self.merge_size)
        grid = (1, height // self.patch_size, width // self.patch_size)
        size = (height, width)
        mm_hash = item_hash(self.fingerprint, kind, grid, size, rows.data)
        num_tokens = self.num_tokens(height, width)
        return ReadyItem(kind, mm_hash, grid, size, len(rows), num_tokens, rows)

    def positions(
        self, num_tokens: int, offsets: list[int], items: list[PreparedItem]
    ) -> tuple[np.ndarray, int]:
        grids = [merged_grid(item, self.merge_size) for item in items]
        times = [time_positions(item, self.tokens_per_second) for item in items]
        return rope_positions(num_tokens, offsets, grids, times)

    def rope_parameter(self, num_tokens: int) -> int:
        return 0


class Qwen25VideoRules:
    """The rules of Qwen2.5-VL for the videos of one checkpoint. They do not change."""

    def __init__(self, checkpoint: Checkpoint, limits: ItemLimits) -> None:
        """Read the checkpoint's settings. Raises ValueError if the limits cannot be kept."""
        self.fingerprint = checkpoint.fingerprint
        self.patch_size, self.merge_size = patch_sizes(checkpoint)
        self.factor = self.patch_size * self.merge_size
        self.frames_per_step = family_rules.temporal_patch_size(checkpoint)
        self.min_pixels, self.max_pixels = pixel_limits(
            checkpoint.preprocessor_config, limits, self.factor
        )
        self.max_tokens = family_rules.max_video_tokens(checkpoint)
        self.resizes_oversized = limits.resizes_oversized

    def fitting_size(
        self,
        height: int,
        width: int,
        num_frames: int,
        max_patches: int,
        bounds: PixelBounds = NO_BOUNDS,
    ) -> tuple[int, int]:
        low, high = bounds.within(self.min_pixels, self.max_pixels)
        most = self.max_tokens
        if max_patches:
            most = min(most, max_patches // self.merge_size**2)
        aim = most if self.resizes_oversized else self.max_tokens
        largest = aim // self.num_steps(num_frames) * self.factor**2
        if largest:
            high = max(min(high, largest), self.min_pixels)
            size = smart_resize(height, width, self.factor, min(low, high), high)
            if self.num_tokens(*size, num_frames) <= most:
                return size
        raise TooLarge(
            f"its {num_frames} frames become more than {most} tokens: send fewer of them, or ask "
            "for a smaller fps"
        )

    def num_steps(self, num_frames: int) -> int:
        return -(-num_frames // self.frames_per_step)

    def num_tokens(self, height: int, width: int, num_frames: int) -> int:
        return self.num_steps(num_frames) * height * width // self.factor**2

    def prepare(self, frames: np.ndarray, step_seconds: float) -> ReadyItem:
        num_frames, height, width, _ = frames.shape
        rows = video_patches(frames, self.patch_size, self.merge_size, self.frames_per_step)
        grid = (
            self.num_steps(num_frames),
            height // self.patch_size,
            width // self.patch_size,
        )
        size = (height, width)
        # When the steps are is no part of the name: it does not change the embeddings.
        mm_hash = item_hash(self.fingerprint, "video", grid, size, rows.data)
        num_tokens = len(rows) // self.merge_size**2
        return ReadyItem("video", mm_hash, grid, size, len(rows), num_tokens, rows, step_seconds)


def merged_grid(item: PreparedItem, merge_size: int) -> tuple[int, int]:
    """Return the rows and columns of the tokens that an image, or a step of a video, becomes."""
    _, height, width = item.grid_thw
    return height // merge_size, width // merge_size


def time_positions(item: PreparedItem, tokens_per_second: int) -> np.ndarray:
    """Return the position in time of each step of an item, from 0 on: int64 [num_steps].

    The reference computes with single precision, which decides where a position is rounded down.
    """
    steps = np.arange(item.grid_thw[0], dtype=np.float32)
    seconds = steps * np.float32(item.step_seconds)
    return (seconds * np.float32(tokens_per_second)).astype(np.int64)


def rope_positions(
    num_tokens: int,
    offsets: list[int],
    grids: list[tuple[int, int]],
    times: list[np.ndarray],
) -> tuple[np.ndarray, int]:
    """Return M-RoPE's (time, height, width) of each token, int64 [3, num_tokens], and the delta.

    Text counts up equally in all three. An item at `offsets[i]` counts from where the text before
    it ended. It has a step at each of `times[i]`, of `grids[i]` (rows, columns) tokens. The text
    after it goes on beyond the largest of its positions.
    """
    positions = np.empty((3, num_tokens), dtype=np.int64)
    done = counter = 0
    for offset, (rows, columns), steps in zip(offsets, grids, times, strict=True):
        positions[:, done:offset] = np.arange(counter, counter + offset - done)
        counter += offset - done
        done = offset + len(steps) * rows * columns
        places = np.stack(np.meshgrid(steps, np.arange(rows), np.arange(columns), indexing="ij"))
        positions[:, offset:done] = counter + places.reshape(3, -1)
        counter += int(places.max()) + 1
    positions[:, done:] = np.arange(counter, counter + num_tokens - done)
    return positions, counter - done


def patch_sizes(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return the patch size and the merge size."""
    config = checkpoint.preprocessor_config
    vision = checkpoint.vision_config
    merge_size = config.get("merge_size") or vision["spatial_merge_size"]
    return family_rules.patch_size(checkpoint), merge_size


def pixel_limits(config: dict[str, Any], limits: ItemLimits, factor: int) -> tuple[int, int]:
    """Return the least and the most pixels of a resized image.

    Raises ValueError if they contradict each other, or no image can keep to them.
    """
    low, high = family_rules.pixel_limits(config, limits.min_pixels, limits.max_pixels)
    if not 0 < low <= high or high < factor * factor:
        raise ValueError(
            f"min_pixels is {low} and max_pixels {high}: give 0 < min_pixels <= max_pixels, and at "
            f"least {factor * factor}"
        )
    return low, high
