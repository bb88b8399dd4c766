"""Golden checkpoints in the layouts in which fine-tunes of Qwen2.5-VL are published.

The weights stay the same, and so must everything that is computed from them.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.golden import GoldenCase

KEPT_FLAT = (
    "architectures",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "model_type",
    "torch_dtype",
    "vision_config",
)
Config = dict[str, Any]


@dataclass(frozen=True)
class FineTune(GoldenCase):
    """A golden case whose checkpoint is in another layout."""

    folder: Path = Path()

    @property
    def checkpoint(self) -> Path:
        return self.folder


def twice(config: Config) -> Config:
    """As transformers 4.53 writes it: flat, and nested with nulls. olmOCR is published so."""
    text = {k: v for k, v in config.items() if k not in ("vision_config", "tie_word_embeddings")}
    text |= {"model_type": "qwen2_5_vl_text", "torch_dtype": "float64", "sliding_window": None}
    text |= {"image_token_id": None, "video_token_id": None}
    text["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    rope = {"mrope_section": config["rope_scaling"]["mrope_section"]}
    rope |= {"rope_type": "default", "type": "default"}
    text["rope_scaling"] = rope
    vision = config["vision_config"] | {"model_type": "qwen2_5_vl", "in_channels": 3}
    return config | {"text_config": text, "vision_config": vision, "rope_scaling": rope}


def nested(config: Config) -> Config:
    """As transformers 4.57 and 5 write it: the language model is nested, and only there."""
    text = {k: v for k, v in twice(config)["text_config"].items() if k not in KEPT_FLAT}
    rope = text.pop("rope_scaling")
    text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), **rope}
    text["tie_word_embeddings"] = config["tie_word_embeddings"]
    flat = {k: v for k, v in config.items() if k in KEPT_FLAT}
    vision = {k: v for k, v in config["vision_config"].items() if k not in ("in_chans",)}
    return flat | {"text_config": text, "vision_config": vision}


def text_type(config: Config) -> Config:
    """Some trainers save the model type of the language model."""
    return twice(config) | {"model_type": "qwen2_5_vl_text"}


def unsaid_rope(config: Config) -> Config:
    return config | {"rope_scaling": {"mrope_section": config["rope_scaling"]["mrope_section"]}}


LAYOUTS: dict[str, Callable[[Config], Config]] = {
    "twice": twice,
    "nested": nested,
    "text type": text_type,
    "unsaid rope": unsaid_rope,
}


def write(case: GoldenCase, layout: str, folder: Path) -> FineTune:
    """Write a golden checkpoint in another layout: its configuration, and with new names."""
    shutil.copytree(case.checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(LAYOUTS[layout](config)))
    rename_weights(folder)
    move_processor(folder)
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").write_text(template)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    return FineTune(case.name, folder=folder)


def rename_weights(folder: Path) -> None:
    """Give the tensors the names of newer transformers, and store the head although it is tied."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model."):
            name = f"model.language_model.{name.removeprefix('model.')}"
        renamed[name] = tensor
    if "lm_head.weight" not in renamed:
        renamed["lm_head.weight"] = renamed["model.language_model.embed_tokens.weight"].clone()
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})


def move_processor(folder: Path) -> None:
    """Write the image processor as transformers 5 does, next to that of videos."""
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    size = {"shortest_edge": config.pop("min_pixels"), "longest_edge": config.pop("max_pixels")}
    config |= {"size": size, "min_pixels": None, "max_pixels": None}
    whole = {"processor_class": "Qwen2_5_VLProcessor", "image_processor": config}
    (folder / "processor_config.json").write_text(json.dumps(whole))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(config))
