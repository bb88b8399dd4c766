"""Write a training checkpoint as a Hugging Face directory.

python export.py run/last.pt ../../models/tiny-ocr
"""

import json
import sys
from pathlib import Path

import settings as s
import torch
from model import TinyOCR, exported
from safetensors.torch import save_file
from tokenizer import CHAT_TEMPLATE, Json, tokenizer_config, tokenizer_json, vocabulary


def vision_config() -> Json:
    return {
        "depth": s.VISION_DEPTH,
        "hidden_act": "silu",
        "hidden_size": s.VISION_SIZE,
        "intermediate_size": s.VISION_INNER,
        "num_heads": s.VISION_HEADS,
        "in_chans": 3,
        "out_hidden_size": s.TEXT_SIZE,
        "patch_size": s.PATCH,
        "spatial_merge_size": s.CELL // s.PATCH,
        "spatial_patch_size": s.PATCH,
        "window_size": s.WINDOW,
        "fullatt_block_indexes": list(s.FULL_ATTENTION),
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    }


def token_ids() -> Json:
    return {
        "bos_token_id": s.TOKEN["<|endoftext|>"],
        "eos_token_id": s.TOKEN["<|im_end|>"],
        "vision_start_token_id": s.TOKEN["<|vision_start|>"],
        "vision_end_token_id": s.TOKEN["<|vision_end|>"],
        "vision_token_id": s.TOKEN["<|vision_pad|>"],
        "image_token_id": s.TOKEN["<|image_pad|>"],
        "video_token_id": s.TOKEN["<|video_pad|>"],
    }


def text_config() -> Json:
    return {
        "hidden_act": "silu",
        "hidden_size": s.TEXT_SIZE,
        "initializer_range": 0.02,
        "intermediate_size": s.TEXT_INNER,
        "max_position_embeddings": s.CONTEXT,
        "max_window_layers": s.TEXT_DEPTH,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": s.TEXT_HEADS,
        "num_hidden_layers": s.TEXT_DEPTH,
        "num_key_value_heads": s.TEXT_KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": s.ROPE_THETA,
        "sliding_window": s.CONTEXT,
        "tie_word_embeddings": False,
    }


def config(dtype: torch.dtype) -> Json:
    about = {"torch_dtype": str(dtype).removeprefix("torch."), "transformers_version": "4.41.2"}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        **token_ids(),
        **text_config(),
        **about,
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": vision_config(),
        "rope_scaling": {"type": "mrope", "mrope_section": list(s.MROPE_SECTION)},
        "vocab_size": s.VOCABULARY,
    }


def preprocessor_config() -> Json:
    return {
        "min_pixels": s.MIN_CELLS * s.CELL**2,
        "max_pixels": s.MAX_CELLS * s.CELL**2,
        "patch_size": s.PATCH,
        "temporal_patch_size": 2,
        "merge_size": s.CELL // s.PATCH,
        "image_mean": s.IMAGE_MEAN,
        "image_std": s.IMAGE_STD,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }


def generation_config() -> Json:
    end = s.TOKEN["<|im_end|>"]
    pad = s.TOKEN["<|endoftext|>"]
    return {
        "bos_token_id": pad,
        "pad_token_id": pad,
        "do_sample": False,
        "eos_token_id": [end, pad],
        "transformers_version": "4.49.0",
    }


def write(model: TinyOCR, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in exported(model).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = {
        "config": config(dtype),
        "preprocessor_config": preprocessor_config(),
        "generation_config": generation_config(),
        "tokenizer": tokenizer_json(),
        "tokenizer_config": tokenizer_config(),
        "vocab": vocabulary(),
        "chat_template": {"chat_template": CHAT_TEMPLATE},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(
            json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        )


def load(checkpoint: Path) -> TinyOCR:
    model = TinyOCR()
    model.load_state_dict(torch.load(checkpoint)["model"])
    return model


def main() -> None:
    if len(sys.argv) != 3:
        raise ValueError("usage: python export.py run/last.pt FOLDER")
    write(load(Path(sys.argv[1])), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
