"""The byte-level tokenizer and the chat template, in the files of a published Qwen2.5-VL."""

from settings import CONTEXT, PLAIN_ADDED, SPECIAL, TOKEN

Json = dict[str, object]

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- set ns = namespace(img=0, vid=0) -%}"
    "{%- for m in messages -%}"
    "{%- if loop.first and m.role != 'system' -%}{{- '<|im_start|>system\\nYou are a helpful "
    "assistant.<|im_end|>\\n' -}}{%- endif -%}"
    "{{- '<|im_start|>' ~ m.role ~ '\\n' -}}"
    "{%- if m.content is string -%}{{- m.content -}}"
    "{%- else -%}{%- for p in m.content -%}"
    "{%- if p.type in ['image', 'image_url'] -%}{%- set ns.img = ns.img + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Picture ' ~ ns.img ~ ': ' -}}{%- endif -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif p.type in ['video', 'video_url'] -%}{%- set ns.vid = ns.vid + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Video ' ~ ns.vid ~ ': ' -}}{%- endif -%}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif p.type == 'text' -%}{{- p.text -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def byte_characters() -> list[str]:
    """The printable stand-in for each byte of a byte-level vocabulary (as in GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    table = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    return [table[b] for b in range(256)]


def vocabulary() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_characters())}


def added_tokens() -> list[tuple[int, Json]]:
    return [
        (TOKEN[t], {"content": t, **PLAIN, "special": t in SPECIAL}) for t in SPECIAL + PLAIN_ADDED
    ]


def byte_pair_model() -> Json:
    options = {
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
    }
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        **options,
        "ignore_merges": False,
        "vocab": vocabulary(),
        "merges": [],
    }


def tokenizer_json() -> Json:
    pieces = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in added_tokens()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pieces, BYTE_LEVEL]},
        "post_processor": BYTE_LEVEL | {"trim_offsets": False},
        "decoder": BYTE_LEVEL | {"add_prefix_space": True, "use_regex": True},
        "model": byte_pair_model(),
    }


def tokenizer_config() -> Json:
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): token for i, token in added_tokens()},
        "additional_special_tokens": SPECIAL[1:],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": CONTEXT,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
