"""Items and prompts of one checkpoint, prepared for the stages behind preprocess.

What differs between model families is in `services/preprocess/families`.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, TypeAlias, assert_never

import numpy as np
from PIL.Image import Image

from common.chat import ChatOptions
from common.checkpoint import Checkpoint
from common.errors import ContextLengthExceeded, InvalidRequest
from common.messages import ItemKind
from common.pixel_bounds import NO_BOUNDS, PixelBounds
from common.vocabulary import Vocabulary, open_vocabulary
from common.wire import Buffer
from services.preprocess import chat_template, hermes, images, videos
from services.preprocess.chat_template import ChatTemplate
from services.preprocess.families import FamilyRules, VideoRules
from services.preprocess.image_formats import READABLE
from services.preprocess.prepared import ExpandedPrompt, PreparedItem
from services.preprocess.prompts import Piece, PromptParts, num_chars
from services.preprocess.sampling_defaults import add_instruction
from services.preprocess.videos import Clip, VideoForm, VideoLimits

MAX_CHARS_PER_TOKEN = 16
"""No text has this many characters per token on average. Longer texts are refused before they are
tokenized: tokenizing megabytes only to refuse them would block the process for seconds."""


Opened: TypeAlias = Image | Clip
"""An item whose headers were read: an image or a video."""


class Preprocessor:
    """Prepares items and prompts. It does not change after it was made."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        rules: FamilyRules,
        max_model_len: int | None = None,
        known_as: str = "",
        video_rules: VideoRules | None = None,
        video_limits: VideoLimits = VideoLimits(),
        image_formats: Sequence[str] = READABLE,
    ) -> None:
        """`max_model_len` is the context in tokens, and the model's own by default.

        `known_as` is the published name of the model, if its directory does not say it. Without
        `video_rules`, the model takes no videos. Images are read in the `image_formats`.
        Raises ValueError if the model cannot be served with `max_model_len`.
        """
        self.checkpoint = checkpoint
        self.rules = rules
        self.video_rules = video_rules
        self.video_limits = video_limits
        self.image_formats = image_formats
        self.max_model_len = checkpoint.max_model_len if max_model_len is None else max_model_len
        if objection := checkpoint.objection_to_context(self.max_model_len):
            raise ValueError(f"max_model_len is {max_model_len}, but {objection}")
        self.vocab_size = checkpoint.sizes.vocab_size
        self.placeholder_ids = checkpoint.family.placeholder_ids(checkpoint)
        self.placeholder_id = self.placeholder_ids["image"]
        self.tasks = checkpoint.family.tasks_of(checkpoint)
        self.prompt_forms = checkpoint.family.prompt_forms(checkpoint)
        names = (known_as,) if known_as else checkpoint.names
        self.defaults = checkpoint.family.request_defaults(checkpoint, names)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens of the model. Raises BadCheckpoint if its file is damaged."""
        return open_vocabulary(self.checkpoint)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template of the model. Raises BadCheckpoint if there is none, or it is wrong."""
        return chat_template.load(self.checkpoint.path)

    @cached_property
    def tool_template(self) -> ChatTemplate:
        """The chat template for tools, if the model's own knows none.

        Raises InvalidRequest if the model does not speak ChatML.
        """
        if self.vocabulary.id_of("<|im_start|>") is None:
            raise InvalidRequest("this model takes no tools: its chat template knows none")
        return ChatTemplate(hermes.SOURCE, self.template.special_tokens)

    @property
    def placeholder(self) -> str | None:
        """The name of the token that stands for an image in a prompt, if there is one."""
        return self.placeholder_of("image")

    def placeholder_of(self, kind: ItemKind) -> str | None:
        """Return the name of the token that stands for an item in a prompt, if there is one."""
        placeholder_id = self.placeholder_ids.get(kind)
        return None if placeholder_id is None else self.vocabulary.token_of(placeholder_id)

    def check_kinds(self, kinds: Sequence[ItemKind]) -> None:
        """Raise InvalidRequest if the model does not take items of one of these kinds."""
        for index, kind in enumerate(kinds):
            if kind not in self.placeholder_ids:
                known = " and ".join(f"{taken}s" for taken in self.placeholder_ids)
                raise InvalidRequest(
                    f"{kind} {index}: this model takes no {kind}s, only {known}", item=index
                )

    def open_item(self, kind: ItemKind, data: Buffer, form: VideoForm = VideoForm()) -> Opened:
        """Read the headers of an encoded item. A video has a `form`.

        Raises UnreadableImage or TooLarge. The caller knows which item it was.
        """
        match kind:
            case "image":
                return images.open_image(data, formats=self.image_formats)
            case "video":
                return videos.open_clip(data, form, self.video_limits, self.image_formats)
            case _:
                assert_never(kind)

    def num_tokens(
        self, size: tuple[int, int], max_patches: int = 0, bounds: PixelBounds = NO_BOUNDS
    ) -> int:
        """Return the tokens that an image of this (height, width) becomes.

        Raises InvalidRequest if there can be no such image.
        """
        return self.rules.num_tokens(*self.rules.fitting_size(*size, max_patches, bounds))

    def num_tokens_of(
        self, opened: Opened, max_patches: int = 0, bounds: PixelBounds = NO_BOUNDS
    ) -> int:
        """Return the tokens that an opened item becomes, as far as its headers say that.

        Raises InvalidRequest if there can be no such item.
        """
        if isinstance(opened, Image):
            return self.num_tokens(images.size_of(opened), max_patches, bounds)
        assert self.video_rules is not None
        size = self.video_rules.fitting_size(*opened.size, opened.num_frames, max_patches, bounds)
        return self.video_rules.num_tokens(*size, opened.num_frames)

    def prepare_item(
        self,
        kind: ItemKind,
        data: Buffer | Opened,
        max_patches: int = 0,
        form: VideoForm = VideoForm(),
        bounds: PixelBounds = NO_BOUNDS,
    ) -> PreparedItem:
        """Decode, resize, cut into patches and name one item, encoded or already opened.

        It must have at most `max_patches` patches, if that is not 0. The client's `bounds` are kept
        as far as the deployment's limits allow.

        Raises
        ------
        InvalidRequest
            or its children UnreadableImage and TooLarge. The caller knows which item it was.
        """
        opened = data
        if isinstance(opened, bytes | bytearray | memoryview):
            opened = self.open_item(kind, opened, form)
        if not isinstance(opened, Image):
            return self._prepare_video(opened, max_patches, bounds)
        image = images.decode(opened)
        size = self.rules.fitting_size(image.height, image.width, max_patches, bounds)
        resampling = self.checkpoint.family.resampling
        return self.rules.prepare_item(kind, images.resize(image, *size, resampling))

    def _prepare_video(self, clip: Clip, max_patches: int, bounds: PixelBounds) -> PreparedItem:
        rules = self.video_rules
        assert rules is not None
        height, width = rules.fitting_size(*clip.size, clip.num_frames, max_patches, bounds)
        frames = np.empty((clip.num_frames, height, width, 3), dtype=np.uint8)
        for index, frame in enumerate(clip.frames()):
            frames[index] = images.resize(frame, height, width)
        return rules.prepare(frames, rules.frames_per_step / clip.fps)

    def render(self, messages: Any, options: ChatOptions = ChatOptions()) -> PromptParts:
        """Return the prompt of chat messages.

        Raises InvalidRequest if they are malformed, or the model has no words for them.
        """
        known = add_instruction(chat_template.normalise(messages), self.defaults.instruction)
        if self.rules.chat_prompt is not None:
            refuse_for_own_prompt(known, options)
            return self.rules.chat_prompt(known, options)
        template = self.template
        if uses_tools(known, options) and not template.knows_tools:
            template = self.tool_template
        return [template.prompt(known, options, self.vocabulary.first_characters)]

    def check_token_ids(self, token_ids: np.ndarray) -> np.ndarray:
        """Return the token ids of a prompt, int64 [num_tokens], if they are the model's.

        Raises InvalidRequest if there are none, or one is outside the model's vocabulary. The
        placeholder of items may be outside it.
        """
        if token_ids.size == 0:
            raise InvalidRequest("the prompt is empty")
        is_outside = (token_ids < 0) | (token_ids >= self.vocab_size)
        placeholders = [known for known in self.placeholder_ids.values() if known is not None]
        bad = token_ids[is_outside & ~np.isin(token_ids, placeholders)]
        if bad.size:
            raise InvalidRequest(
                f"token id {bad[0]} is outside the model's vocabulary of {self.vocab_size}"
            )
        return token_ids

    def encode(self, parts: PromptParts, is_chat: bool = True) -> np.ndarray:
        """Return the token ids of a prompt: int64 [num_tokens]. Only those of a chat are fitted.

        Raises
        ------
        InvalidRequest
            if the text is not valid Unicode.
        ContextLengthExceeded
            if it is far longer than the model's context.
        """
        if (length := num_chars(parts)) > MAX_CHARS_PER_TOKEN * self.max_model_len:
            problem = f"Your prompt has {length} characters, which do not fit: shorten it."
            raise ContextLengthExceeded.beyond(self.max_model_len, problem)
        token_ids: list[int] = []
        for part in parts:
            token_ids += self._encode_piece(part) if isinstance(part, Piece) else [part]
        found = np.array(token_ids, dtype=np.int64)
        fit = self.rules.fit_prompt if is_chat else None
        return found if fit is None else fit(found)

    def _encode_piece(self, piece: Piece) -> list[int]:
        try:
            piece.text.encode()
        except UnicodeEncodeError as e:
            raise InvalidRequest(
                "the text holds half of a surrogate pair; send valid Unicode"
            ) from e
        if piece.mark:
            return self.vocabulary.encode_marked(piece.text, piece.mark)
        return self.vocabulary.encode(piece.text, piece.special_tokens, piece.continues)

    def names_of(self, token_ids: Iterable[int]) -> list[str]:
        """Return the names of tokens in the vocabulary; empty for one that is not in it."""
        return [self.vocabulary.token_of(token_id) or "" for token_id in token_ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens.

        Raises InvalidRequest if the vocabulary has no such token.
        """
        known = self.vocabulary.bytes_by_id
        for token_id in token_ids:
            if token_id not in known:
                raise InvalidRequest(f"the model's vocabulary has no token {token_id}")
        return self.vocabulary.decode(token_ids)

    def find_placeholders(self, token_ids: np.ndarray, kinds: Sequence[ItemKind]) -> np.ndarray:
        """Return the index of the placeholder of each item of a prompt: int64 [num_items].

        The items of one kind stand in the order of its placeholders.

        Raises
        ------
        InvalidRequest
            if the number of placeholders is not the number of items.
        """
        found = np.empty(len(kinds), dtype=np.int64)
        for kind, placeholder_id in self.placeholder_ids.items():
            own = [index for index, other in enumerate(kinds) if other == kind]
            places = np.flatnonzero(token_ids == placeholder_id)
            if len(places) != len(own):
                name = self.placeholder_of(kind)
                advice = f", and leave {name} out of the text" if name else ""
                raise InvalidRequest(
                    f"the prompt has {len(places)} {kind} placeholders for {len(own)} {kind}s:"
                    f" give one for each {kind}{advice}"
                )
            found[own] = places
        family = self.checkpoint.family
        if objection := family.objection_to_prompt(self.checkpoint, token_ids):
            raise InvalidRequest(f"the prompt's markers of images are wrong: {objection}")
        return found

    def expanded_ids(
        self, token_ids: np.ndarray, kinds: Sequence[ItemKind], num_tokens: Sequence[int]
    ) -> np.ndarray:
        """Return a prompt, int64 [n], in which the placeholder of item i stands num_tokens[i]
        times.

        Raises InvalidRequest as `find_placeholders` does.
        """
        found = self.find_placeholders(token_ids, kinds)
        return repeated(token_ids, found, np.array(num_tokens, dtype=np.int64))

    def expand(self, token_ids: np.ndarray, items: list[PreparedItem]) -> ExpandedPrompt:
        """Repeat each item's placeholder as often as the item has tokens, and add the positions.

        The items are in the order of the prompt.

        Raises
        ------
        InvalidRequest
            if the number of placeholders is not the number of items, or the model takes no prompt
            of this form.
        """
        found = self.find_placeholders(token_ids, [item.kind for item in items])
        lengths = np.array([item.num_tokens for item in items], dtype=np.int64)
        offsets = found + np.cumsum(lengths - 1) - (lengths - 1)
        expanded = repeated(token_ids, found, lengths)
        form = (len(expanded), tuple(zip(offsets.tolist(), lengths.tolist(), strict=True)))
        if self.prompt_forms is not None and form not in self.prompt_forms:
            raise InvalidRequest("this model takes chat messages only: send no token ids")
        positions, rope_delta = self.rules.positions(len(expanded), offsets.tolist(), items)
        return ExpandedPrompt(
            expanded,
            positions,
            rope_delta,
            np.stack([offsets, lengths], axis=1),
            self.rules.rope_parameter(len(expanded)),
            self.rules.whole,
        )


def repeated(token_ids: np.ndarray, places: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the token ids with the one at places[i] repeated lengths[i] times."""
    repeats = np.ones(len(token_ids), dtype=np.int64)
    repeats[places] = lengths
    return np.repeat(token_ids, repeats)


def uses_tools(messages: list[dict[str, Any]], options: ChatOptions) -> bool:
    """Whether a conversation has tools, or calls of tools."""
    return bool(options.tools) or any(
        message["role"] == "tool" or "tool_calls" in message for message in messages
    )


def refuse_for_own_prompt(messages: list[dict[str, Any]], options: ChatOptions) -> None:
    """Raise InvalidRequest if a conversation needs a chat template, which the model lacks."""
    if uses_tools(messages, options):
        raise InvalidRequest("this model takes no tools: leave tools and tool messages out")
    if options.template_kwargs:
        raise InvalidRequest("chat_template_kwargs: this model has no chat template; leave it out")
