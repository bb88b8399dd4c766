"""What the fields of a checkpoint's JSON files may hold. A field that is not listed is not read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.families.family import BadCheckpoint
from common.model_files import shown

MAX_COUNT = 2**31
MAX_NUMBER = 1e30
MAX_ITEMS = 1024


@dataclass(frozen=True)
class Kind:
    """What a field holds: its name for people, and a test of a value."""

    name: str
    fits: Callable[[Any], bool]
    is_optional: bool = True
    """Whether null means that the field is missing."""


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and -MAX_NUMBER <= value <= MAX_NUMBER  # NaN is neither


def is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_COUNT


def is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list) and len(value) <= MAX_ITEMS and all(map(fits, value))
    )


def is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_COUNT


def is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


COUNT = Kind(f"a positive integer of at most {MAX_COUNT}", is_count, is_optional=False)
OPTIONAL_COUNT = Kind(COUNT.name, is_count)
POSITIVE = Kind("a positive number", is_positive)
FLAG = Kind("true or false", lambda value: type(value) is bool)
TEXT = Kind("a text", lambda value: isinstance(value, str) and len(value) <= MAX_ITEMS)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
TOKEN = Kind("a token id", is_token)
TOKENS = Kind(
    "a token id, or a list of token ids",
    lambda value: is_token(value) or is_list_of(is_token)(value),
)
COUNTS = Kind("a list of counts", is_list_of(is_token))
NUMBERS = Kind("a list of numbers", is_list_of(is_number))
SHARE = Kind("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)

CONFIG = {
    "bias": FLAG,
    "bos_token_id": TOKEN,
    "depth": COUNT,
    "do_image_splitting": FLAG,
    "dtype": TEXT,
    "eos_token_id": TOKENS,
    "fullatt_block_indexes": Kind(COUNTS.name, COUNTS.fits, is_optional=False),
    "head_dim": OPTIONAL_COUNT,
    "heads": COUNT,
    "hidden_act": TEXT,
    "hidden_size": COUNT,
    "image_size": COUNT,
    "image_start_id": Kind(TOKEN.name, TOKEN.fits, is_optional=False),
    "image_token_id": TOKEN,
    "in_channels": OPTIONAL_COUNT,
    "in_chans": OPTIONAL_COUNT,
    "intermediate_size": COUNT,
    "kernel_size": COUNT,
    "kv_channels": COUNT,
    "layer_norm_eps": POSITIVE,
    "layer_norm_epsilon": POSITIVE,
    "layers": COUNT,
    "llm_hidden_size": COUNT,
    "max_position_embeddings": COUNT,
    "mlp_ratio": POSITIVE,
    "no_bias": FLAG,
    "num_attention_heads": COUNT,
    "num_channels": COUNT,
    "num_embeddings": COUNT,
    "num_heads": COUNT,
    "num_hidden_layers": COUNT,
    "num_key_value_heads": COUNT,
    "out_hidden_size": COUNT,
    "output_dim": COUNT,
    "patch_size": COUNT,
    "rms_norm_eps": POSITIVE,
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
    "rope_theta": POSITIVE,
    "rotary_emb_base": POSITIVE,
    "rotary_pct": POSITIVE,
    "scale_attn_weights": FLAG,
    "seq_length": COUNT,
    "size": OBJECT,
    "spatial_merge_size": COUNT,
    "stride": COUNT,
    "temporal_patch_size": COUNT,
    "tie_word_embeddings": FLAG,
    "tokens_per_second": COUNT,
    "torch_dtype": TEXT,
    "use_dynamic_ntk": FLAG,
    "use_logn_attn": FLAG,
    "use_sliding_window": FLAG,
    "video_token_id": TOKEN,
    "visual_hidden_size": COUNT,
    "vocab_size": COUNT,
    "width": COUNT,
    "window_size": COUNT,
}
ROPE = {"mrope_section": COUNTS, "rope_theta": POSITIVE, "rope_type": TEXT, "type": TEXT}
GENERATION = {
    "chat_format": TEXT,
    "do_sample": FLAG,
    "eos_token_id": TOKENS,
    "max_new_tokens": OPTIONAL_COUNT,
    "min_p": SHARE,
    "repetition_penalty": POSITIVE,
    "temperature": Kind("a number from 0", lambda value: is_number(value) and value >= 0),
    "top_k": Kind("an integer from -1", lambda v: type(v) is int and -1 <= v <= MAX_COUNT),
    "top_p": SHARE,
}
PREPROCESSOR = {
    "image_mean": NUMBERS,
    "image_std": Kind("a list of positive numbers", is_list_of(is_positive)),
    "max_pixels": OPTIONAL_COUNT,
    "merge_size": OPTIONAL_COUNT,
    "min_pixels": OPTIONAL_COUNT,
    "patch_size": OPTIONAL_COUNT,
    "rescale_factor": POSITIVE,
    "size": OBJECT,
    "temporal_patch_size": OPTIONAL_COUNT,
}
SIZE = {"longest_edge": OPTIONAL_COUNT, "shortest_edge": OPTIONAL_COUNT}


def check_fields(config: Mapping[str, Any], kinds: Mapping[str, Kind], file: Path) -> None:
    """Check each field of a file that has a kind.

    Raises
    ------
    BadCheckpoint
        if its value is of another kind.
    """
    for name in kinds.keys() & config.keys():
        kind = kinds[name]
        value = config[name]
        if value is None and kind.is_optional:
            continue
        if not kind.fits(value):
            raise BadCheckpoint(
                f"{file.parent}: {name} in {file.name} is {shown(value)}, which is not {kind.name}"
            )
