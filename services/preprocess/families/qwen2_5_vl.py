"""Qwen2.5-VL and RolmOCR: images to patches, prompts to token ids with placeholders and M-RoPE
positions."""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from common.checkpoint import Checkpoint, read_json
from common.errors import InvalidRequest, TooLarge
from common.messages import ItemKind
from services.preprocess import chat_template, images
from services.preprocess.prepared import ExpandedPrompt, PreparedItem

MAX_ASPECT_RATIO = 200
# No text has so many characters a token on average; tokenizing megabytes only to refuse them would
# hold the process for seconds.
MAX_CHARS_PER_TOKEN = 16
# What the family's image processor takes where preprocessor_config.json names no limits.
DEFAULT_MIN_PIXELS = 56 * 56
DEFAULT_MAX_PIXELS = 28 * 28 * 1280


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The (height, width) to resize to: multiples of `factor` with about the same aspect ratio,
    within the limits of area.

    Raises
    ------
    InvalidRequest
        where one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InvalidRequest(
            f"the image is {width}x{height}: one side may be at most {MAX_ASPECT_RATIO} times the "
            "other"
        )
    # Python rounds halves to even here, and the division by `factor` comes last: both decide single
    # cases.
    rows = round(height / factor)
    columns = round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def patches(rgb: np.ndarray, patch_size: int, merge_size: int) -> np.ndarray:
    """uint8 [height, width, 3] to uint8 [num_patches, 3 * patch_size * patch_size].

    The patches that the tower merges into one token stand together: rows go by (merge row, merge
    column, row inside, column inside), and inside a row by (channel, y, x).
    """
    height, width = (side // patch_size // merge_size for side in rgb.shape[:2])
    cells = rgb.reshape(height, merge_size, patch_size, width, merge_size, patch_size, 3)
    rows = np.ascontiguousarray(cells.transpose(0, 3, 1, 4, 6, 2, 5))
    return rows.reshape(-1, 3 * patch_size * patch_size)


@dataclass(frozen=True)
class Image:
    """One image, resized, with all that is known before its patches are made."""

    rgb: np.ndarray
    """uint8 [height, width, 3], resized."""
    mm_hash: str
    """64 hex digits. Equal for equal pixels in any file format, given the same model and limits."""
    patch_size: int
    merge_size: int
    kind: ItemKind = "image"

    @property
    def content_size(self) -> tuple[int, int]:
        height, width, _ = self.rgb.shape
        return height, width

    @property
    def nbytes(self) -> int:
        return self.rgb.nbytes

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """In patches; a still image is one step in time."""
        return 1, self.rgb.shape[0] // self.patch_size, self.rgb.shape[1] // self.patch_size

    @property
    def merged_grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens that the image becomes."""
        _, height, width = self.grid_thw
        return height // self.merge_size, width // self.merge_size

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid_thw)

    @property
    def num_tokens(self) -> int:
        return math.prod(self.merged_grid)

    def patches(self) -> np.ndarray:
        """uint8 [num_patches, 3 * patch_size * patch_size]: neither normalised nor doubled in time,
        which the tower does."""
        return patches(self.rgb, self.patch_size, self.merge_size)


class Preprocessor:
    """Images and prompts of one checkpoint. Nothing in it changes after it was made."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_model_len: int | None = None,
        resizes_oversized: bool = True,
    ) -> None:
        """`resizes_oversized`: an image that is too large for every vision replica is made smaller,
        else it is refused."""
        self.checkpoint = checkpoint
        self.resizes_oversized = resizes_oversized
        self.patch_size, self.merge_size, self.settings = image_settings(checkpoint)
        self.min_pixels, self.max_pixels = pixel_limits(
            checkpoint.preprocessor_config, min_pixels, max_pixels, self.factor
        )
        self.max_model_len = checkpoint.max_model_len if max_model_len is None else max_model_len
        if not 0 < self.max_model_len <= checkpoint.max_model_len:
            raise ValueError(
                f"max_model_len is {max_model_len}, the model's context is "
                f"{checkpoint.max_model_len}: give at most that"
            )
        self.vocab_size: int = checkpoint.sizes.vocab_size
        self.image_token_id: int = checkpoint.config["image_token_id"]
        self.template = chat_template.load(checkpoint.path)
        self.tokenizer = load_tokenizer(checkpoint)
        self.placeholder = self.tokenizer.id_to_token(self.image_token_id)

    @property
    def factor(self) -> int:
        """Sides of a resized image are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    def prepare_item(
        self, data: bytes | bytearray | memoryview, buckets: tuple[int, ...] = ()
    ) -> Image:
        """Decode, resize and hash one encoded image, which is to fit into one of the buckets
        (numbers of patches), if there are any; its patches are made when they are asked for.

        Raises
        ------
        InvalidRequest
            or its children UnreadableImage and TooLarge. Which image it was the caller knows.
        """
        rgb = images.decode(data)
        height, width = self.fitting_size(rgb.shape[0], rgb.shape[1], max(buckets, default=0))
        return Image(
            images.resize(rgb, height, width),
            self.mm_hash(rgb, height, width),
            self.patch_size,
            self.merge_size,
        )

    def fitting_size(self, height: int, width: int, max_patches: int) -> tuple[int, int]:
        """The size to resize to; within `max_patches`, if that is not 0."""
        rows, columns = smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        if not max_patches or self.num_patches(rows, columns) <= max_patches:
            return rows, columns
        largest = max_patches * self.patch_size**2
        if self.resizes_oversized and largest >= self.min_pixels:
            rows, columns = smart_resize(height, width, self.factor, self.min_pixels, largest)
        if self.num_patches(rows, columns) > max_patches:
            raise TooLarge(
                f"it has {self.num_patches(rows, columns)} patches, the vision replicas take at "
                f"most {max_patches}: send it smaller"
            )
        return rows, columns

    def num_patches(self, height: int, width: int) -> int:
        return height * width // self.patch_size**2

    def mm_hash(self, rgb: np.ndarray, height: int, width: int) -> str:
        """Names the embeddings of the pixels [*, *, 3], resized to height x width, under this
        model."""
        about = [self.checkpoint.fingerprint, self.settings, rgb.shape, height, width]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode() + b"\0")
        digest.update(np.ascontiguousarray(rgb).data)
        return digest.hexdigest()

    def tokenize(self, prompt_kind: str, prompt: Any) -> np.ndarray:
        """Token ids with one placeholder an image, int64 [n], of chat messages or of ids.

        Raises
        ------
        InvalidRequest
            where the messages are malformed, or ids are not the model's.
        """
        if prompt_kind == "messages":
            return self.encode(self.template.render(prompt))
        assert prompt_kind == "token_ids", prompt_kind
        token_ids = np.asarray(prompt, dtype=np.int64)
        if token_ids.size == 0:
            raise InvalidRequest("the prompt is empty")
        bad = token_ids[(token_ids < 0) | (token_ids >= self.vocab_size)]
        if bad.size:
            raise InvalidRequest(
                f"token id {bad[0]} is outside the model's vocabulary of {self.vocab_size}"
            )
        return token_ids

    def encode(self, text: str) -> np.ndarray:
        if len(text) > MAX_CHARS_PER_TOKEN * self.max_model_len:
            raise InvalidRequest(
                f"the prompt's text has {len(text)} characters, far more than the model's context "
                f"of {self.max_model_len} tokens: shorten it"
            )
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise InvalidRequest(
                "the text holds half of a surrogate pair; send valid Unicode"
            ) from e
        return np.array(
            self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids,
            dtype=np.int64,
        )

    def expand(self, token_ids: np.ndarray, images: list[PreparedItem]) -> ExpandedPrompt:
        """Each image's one placeholder, int64 [n], repeated as often as the image has tokens; and
        the positions.

        Raises
        ------
        InvalidRequest
            where there are more or fewer placeholders than images.
        """
        found = np.flatnonzero(token_ids == self.image_token_id)
        if len(found) != len(images):
            raise InvalidRequest(
                f"the prompt has {len(found)} image placeholders for {len(images)} images:"
                f" give one for each image, and leave {self.placeholder} out of the text"
            )
        lengths = np.array([image.num_tokens for image in images], dtype=np.int64)
        repeats = np.ones(len(token_ids), dtype=np.int64)
        repeats[found] = lengths
        offsets = found + np.cumsum(lengths - 1) - (lengths - 1)
        expanded = np.repeat(token_ids, repeats)
        merge = self.merge_size
        grids = [(h // merge, w // merge) for _, h, w in (image.grid_thw for image in images)]
        positions, rope_delta = rope_positions(len(expanded), offsets.tolist(), grids)
        return ExpandedPrompt(expanded, positions, rope_delta, np.stack([offsets, lengths], axis=1))


def rope_positions(
    num_tokens: int, offsets: list[int], grids: list[tuple[int, int]]
) -> tuple[np.ndarray, int]:
    """M-RoPE's (time, height, width) index of each token, int64 [3, num_tokens], and the rope
    delta.

    Text counts up equally in all three. An image of `grids[i]` (rows, columns) tokens at
    `offsets[i]` stands still in time and counts rows and columns from where the text before it
    ended; the text after it goes on beyond its longer side.
    """
    positions = np.empty((3, num_tokens), dtype=np.int64)
    done = counter = 0
    for offset, (rows, columns) in zip(offsets, grids, strict=True):
        positions[:, done:offset] = np.arange(counter, counter + offset - done)
        counter += offset - done
        done = offset + rows * columns
        positions[0, offset:done] = counter
        positions[1, offset:done] = counter + np.repeat(np.arange(rows), columns)
        positions[2, offset:done] = counter + np.tile(np.arange(columns), rows)
        counter += max(rows, columns)
    positions[:, done:] = np.arange(counter, counter + num_tokens - done)
    return positions, counter - done


def image_settings(checkpoint: Checkpoint) -> tuple[int, int, dict[str, Any]]:
    """Patch size, merge size, and what else decides the pixels that the tower sees."""
    config = checkpoint.preprocessor_config
    vision = checkpoint.vision_config
    patch_size = config.get("patch_size") or vision["patch_size"]
    merge_size = config.get("merge_size") or vision["spatial_merge_size"]
    normalise = {key: config.get(key) for key in ("rescale_factor", "image_mean", "image_std")}
    return (
        patch_size,
        merge_size,
        {"resample": "bicubic", "patch_size": patch_size, "merge_size": merge_size, **normalise},
    )


def pixel_limits(
    config: dict[str, Any], min_pixels: int | None, max_pixels: int | None, factor: int
) -> tuple[int, int]:
    """The least and most pixels of a resized image: as given, else as preprocessor_config.json says
    in either of its layouts."""
    size = config.get("size") or {}
    low = min_pixels or config.get("min_pixels") or size.get("shortest_edge") or DEFAULT_MIN_PIXELS
    high = max_pixels or config.get("max_pixels") or size.get("longest_edge") or DEFAULT_MAX_PIXELS
    if not 0 < low <= high or high < factor * factor:
        raise ValueError(
            f"min_pixels is {low} and max_pixels {high}: give 0 < min_pixels <= max_pixels, and at "
            f"least {factor * factor}"
        )
    return low, high


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    file = checkpoint.path / "tokenizer.json"
    read_json(file)  # raises what a reader of the log understands where the file is damaged
    tokenizer = Tokenizer.from_file(str(file))
    # A file may ask for padding or truncation, which would change prompts silently.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
