"""The reference of Qwen2.5-VL and its fine-tunes: transformers.

Its modules hold no weights. Each gets its own, in float32, when it runs, and drops them again.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from common.checkpoint import BadCheckpoint, Checkpoint
from common.families.qwen2_5_vl import HEAD, is_tied, pixel_limits
from services.commands.verification.questions import Question, read_rgb
from services.commands.verification.reference import (
    ChatReference,
    PixelLimits,
    answer_log_probs,
    forced,
    placed,
)
from services.commands.verification.weights import Float32Weights

EMBEDDING = "model.language_model.embed_tokens"
MAX_IMAGES = 8


class Qwen25VLReference(ChatReference):
    """transformers' own tokenizer, chat template, image processor and model."""

    max_images = MAX_IMAGES

    def __init__(self, checkpoint: Checkpoint, limits: PixelLimits) -> None:
        """Raises ImportError without transformers, BadCheckpoint if it cannot read the files."""
        import transformers
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        self.title = f"transformers {transformers.__version__}"
        low, high = pixel_limits(
            checkpoint.preprocessor_config, limits.min_pixels, limits.max_pixels
        )
        size = {"shortest_edge": low, "longest_edge": high}
        given = {k: v for k, v in checkpoint.preprocessor_config.items() if "_pixels" not in k}
        self._image_processor = Qwen2VLImageProcessorPil.from_dict(given | {"size": size})
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=False
        )
        self._template = chat_template(checkpoint, self._tokenizer)
        config = transformers.Qwen2_5_VLConfig.from_dict(checkpoint.config)
        self._image_id: int = config.image_token_id
        self._merged = config.vision_config.spatial_merge_size**2
        self._image_token: str = self._tokenizer.convert_ids_to_tokens(self._image_id)
        with torch.device("meta"):
            self._model = transformers.Qwen2_5_VLForConditionalGeneration(config).float().eval()
        rebuild_tables(self._model)
        lend_weights(self._model, Float32Weights(checkpoint), is_tied(checkpoint))

    def prompt_ids(self, question: Question) -> list[int]:
        content: Any = question.text
        if question.images:
            pictures = [{"type": "image"}] * len(question.images)
            content = [*pictures, {"type": "text", "text": question.text}]
        text: str = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=True,
        )
        first, *rest = text.split(self._image_token)
        grids: Any = self._pixels(question)["image_grid_thw"] if question.images else []
        for grid, part in zip(grids, rest, strict=True):
            first += self._image_token * (int(grid.prod()) // self._merged) + part
        ids: list[int] = self._tokenizer(first, add_special_tokens=False)["input_ids"]
        return ids

    def log_probs(
        self, question: Question, prompt_ids: Sequence[int], answer_ids: Sequence[int]
    ) -> np.ndarray:
        ids, steps = forced(prompt_ids, answer_ids)
        is_image = ids == self._image_id
        # An answer may hold the placeholder, too, which stands for no image there.
        is_image[len(prompt_ids) :] = False
        with torch.inference_mode():
            embeds = self._model.get_input_embeddings()(ids)
            grids = None
            if question.images:
                pixels = self._pixels(question)
                grids = pixels["image_grid_thw"]
                images = self._model.get_image_features(**pixels, return_dict=True).pooler_output
                embeds = placed(embeds, torch.cat(tuple(images)), is_image)
            positions, _ = self._model.model.get_rope_index(
                ids[None], mm_token_type_ids=is_image[None].int(), image_grid_thw=grids
            )
            logits = self._model(
                inputs_embeds=embeds[None],
                position_ids=positions,
                logits_to_keep=torch.arange(steps.start, steps.stop),
                use_cache=False,
            ).logits[0]
        return answer_log_probs(logits)

    def _pixels(self, question: Question) -> dict[str, torch.Tensor]:
        """Return `pixel_values` and `image_grid_thw` of a question's images."""
        images = [read_rgb(image) for image in question.images]
        return dict(self._image_processor(images=images, return_tensors="pt"))


def chat_template(checkpoint: Checkpoint, tokenizer: Any) -> str:
    """Return the model's template, from whichever file has it. Raises BadCheckpoint."""
    file = checkpoint.path / "chat_template.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    file = checkpoint.path / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise BadCheckpoint(f"{checkpoint.path} has no chat template")
    return tokenizer.chat_template


def rebuild_tables(model: nn.Module) -> None:
    """Compute what modules hold besides weights: the frequencies of positions."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if any(True for _ in child.buffers(recurse=False)):
                setattr(parent, name, type(child)(child.config))


def lend_weights(model: nn.Module, weights: Float32Weights, is_tied: bool) -> None:
    """Make each module read its weights before it runs, and drop them afterwards.

    `is_tied` says that the head reads those of the token embedding.
    """
    for name, module in model.named_modules():
        if module._parameters:
            shared = is_tied and f"{name}.weight" == HEAD
            lend_to(module, weights, EMBEDDING if shared else name)


def lend_to(module: nn.Module, weights: Float32Weights, prefix: str) -> None:
    empty = dict(module._parameters)

    def lend(*_: Any) -> None:
        for name, parameter in empty.items():
            if parameter is not None:
                weight = weights[f"{prefix}.{name}"]
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)

    def drop(*_: Any) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(lend)
    module.register_forward_hook(drop)
