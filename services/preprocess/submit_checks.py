"""Checks of what a Submit holds, before any work is done for it."""

from collections.abc import Sequence

import numpy as np

from common.errors import ContextLengthExceeded, InvalidRequest
from common.messages import MAX_PROMPT_LOGPROBS, Item, Sampling, Submit, Task
from common.pixel_bounds import PixelBounds
from common.wire import Tensor
from services.preprocess.token_rules import check_token_rules

PROMPT_DTYPES = {"messages": "uint8", "text": "uint8", "token_ids": "int64"}
GUIDES_WITHOUT_TEXT = ("", "json_object")


def check_submit(submit: Submit, vocab_size: int, max_model_len: int) -> None:
    """Refuse a request whose fields do not fit together, or do not fit the model.

    Raises InvalidRequest.
    """
    check_vector(submit.prompt, PROMPT_DTYPES.get(submit.prompt_kind, ""), "the prompt")
    if submit.prompt_kind == "token_ids" and len(submit.prompt.data) > 8 * max_model_len:
        num_tokens = len(submit.prompt.data) // 8
        raise ContextLengthExceeded.beyond(
            max_model_len, f"Your prompt has {num_tokens} tokens: shorten it."
        )
    for index, item in enumerate(submit.items):
        check_item(item, f"{item.kind} {index}")
    if submit.chat_options is not None:
        check_vector(submit.chat_options, "uint8", "the chat options")
    if submit.guide is not None:
        check_vector(submit.guide, "uint8", f"the {submit.guide_kind}")
    elif submit.guide_kind not in GUIDES_WITHOUT_TEXT:
        raise InvalidRequest(f"the {submit.guide_kind} is missing")
    if submit.siblings:
        check_siblings(submit)
    if submit.output_token_ids is not None:
        check_output(submit.output_token_ids, vocab_size, max_model_len)
    if any(token_id >= vocab_size for token_id in submit.stopping.stop_token_ids):
        raise InvalidRequest(f"a stop token is outside the model's vocabulary of {vocab_size}")
    if submit.token_rules is not None:
        check_token_rules(submit.token_rules, vocab_size)


def check_siblings(submit: Submit) -> None:
    """Raise InvalidRequest unless several answers to the prompt can be given together."""
    ids = {submit.request_id, *(sibling.request_id for sibling in submit.siblings)}
    if len(ids) <= len(submit.siblings):
        raise InvalidRequest("two answers have the same request id: choose other ones")
    if submit.output_token_ids is not None or submit.task != "generate":
        raise InvalidRequest("only texts that have not begun can be answered several times")


def check_prompt_logprobs(sampling: Sampling, num_tokens: int) -> None:
    """Raise InvalidRequest if too many log-probabilities of a prompt are asked for."""
    count = sampling.num_prompt_logprobs
    if count is not None and num_tokens * (count + 1) > MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            f"prompt_logprobs: {count + 1} for each of {num_tokens} tokens of the prompt are more "
            f"than {MAX_PROMPT_LOGPROBS}: ask for fewer, or shorten the prompt"
        )


def check_item(item: Item, name: str) -> None:
    """Raise InvalidRequest if the fields of an item do not fit together."""
    check_vector(item.data, "uint8", name)
    if objection := PixelBounds(item.min_pixels, item.max_pixels).objection:
        raise InvalidRequest(f"{name}: {objection}")
    if item.frame_lengths is None:
        return
    check_vector(item.frame_lengths, "int64", f"{name}: its frames")
    lengths = item.frame_lengths.numpy()
    # Each length is bounded, so their sum cannot overflow.
    num_bytes = len(item.data.data)
    if not len(lengths) or lengths.min() <= 0 or lengths.max() > num_bytes:
        raise InvalidRequest(f"{name}: a frame is empty, or longer than the video")
    if item.kind != "video" or len(lengths) > num_bytes or lengths.sum() != num_bytes:
        raise InvalidRequest(f"{name}: the frames are not those of its bytes")


def check_task(submit: Submit, tasks: Sequence[Task]) -> None:
    """Raise InvalidRequest unless the task fits the prompt, and the model, which can do `tasks`."""
    task = submit.task
    if task in ("tokenize", "detokenize"):
        if (submit.prompt_kind == "token_ids") != (task == "detokenize"):
            raise InvalidRequest(f"a prompt of the kind {submit.prompt_kind} cannot be {task}d")
        return
    if task not in tasks:
        raise InvalidRequest(f"the model cannot {task}, it can {' and '.join(tasks)}")


def check_output(tensor: Tensor, vocab_size: int, max_model_len: int) -> None:
    """Check the token ids that earlier attempts delivered."""
    check_vector(tensor, "int64", "the delivered output")
    token_ids = tensor.numpy()
    if len(token_ids) > max_model_len:
        raise InvalidRequest("the delivered output is longer than the model's context")
    if np.any((token_ids < 0) | (token_ids >= vocab_size)):
        raise InvalidRequest(
            f"the delivered output has a token outside the model's vocabulary of {vocab_size}"
        )


def check_vector(tensor: Tensor, dtype: str, name: str) -> None:
    if tensor.dtype != dtype or len(tensor.shape) != 1:
        raise InvalidRequest(f"{name} must be a list of {dtype}" if dtype else "no such prompt")
