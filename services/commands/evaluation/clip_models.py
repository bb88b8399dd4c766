"""CLIP models from local files, which judge captions.

torch and what runs the models are imported only when they are used.
"""

import argparse
import importlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

from services.commands.client import ClientError

ARCHITECTURE = "ViT-H-14"
"""The open_clip model whose weights `--open-clip` names."""


class Similarity(Protocol):
    """A model that compares images with texts."""

    name: str

    def cosine(self, image: Path, text: str) -> float:
        """Return the cosine between the embeddings of an image file and a text, in [-1, 1]."""


def check_clip(arguments: argparse.Namespace) -> None:
    """Raise ClientError if the model that the flags name cannot be used."""
    if arguments.clip is not None and arguments.open_clip is not None:
        raise ClientError("give --clip or --open-clip, not both")
    if arguments.clip is not None:
        if not (arguments.clip / "config.json").is_file():
            raise ClientError(f"--clip {arguments.clip}: expected the folder of a CLIP model")
        need("transformers", "pip install 'twinlens[reference]'")
        need("torch", "pip install 'twinlens[engine]'")
    if arguments.open_clip is not None:
        need("open_clip", "pip install open_clip_torch")
        if not arguments.open_clip.is_file():
            raise ClientError(
                f"--open-clip {arguments.open_clip}: expected a file; download "
                "open_clip_pytorch_model.bin of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, or score "
                "with another CLIP model by --clip DIR"
            )


def need(module: str, advice: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ClientError(f"this needs the package {module}: {advice}")


def chosen_clip(arguments: argparse.Namespace) -> Similarity | None:
    """Return the model that the flags name; None if they name none."""
    if arguments.clip is not None:
        return HuggingFaceClip(arguments.clip)
    if arguments.open_clip is not None:
        return OpenClip(arguments.open_clip)
    return None


class HuggingFaceClip:
    """A CLIP model in Hugging Face's layout, on the CPU in float32."""

    def __init__(self, folder: Path) -> None:
        transformers: Any = importlib.import_module("transformers")
        self.name = f"{folder.resolve().name} (transformers)"
        try:
            self._model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True)
            self._processor = transformers.CLIPProcessor.from_pretrained(
                folder, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise ClientError(f"--clip {folder}: {error}") from error
        self._model.eval()

    def cosine(self, image: Path, text: str) -> float:
        import torch
        from PIL import Image

        with Image.open(image) as opened:
            inputs = self._processor(
                text=[text],
                images=opened.convert("RGB"),
                return_tensors="pt",
                truncation=True,
                max_length=self._model.config.text_config.max_position_embeddings,
            )
        with torch.inference_mode():
            output = self._model(**inputs)
        return cosine(output.image_embeds, output.text_embeds)


class OpenClip:
    """open_clip's ViT-H-14 with weights from a file, on the CPU in float32."""

    def __init__(self, weights: Path) -> None:
        open_clip: Any = importlib.import_module("open_clip")
        self.name = f"{ARCHITECTURE} of {weights.name} (open_clip)"
        try:
            # Weights only: nothing in the file can run.
            self._model, _, self._transform = open_clip.create_model_and_transforms(
                ARCHITECTURE, pretrained=str(weights), weights_only=True
            )
        except (OSError, RuntimeError) as error:
            raise ClientError(f"--open-clip {weights}: {error}") from error
        self._tokenizer = open_clip.get_tokenizer(ARCHITECTURE)
        self._model.eval()

    def cosine(self, image: Path, text: str) -> float:
        import torch
        from PIL import Image

        with Image.open(image) as opened:
            pixels = self._transform(opened).unsqueeze(0)
        with torch.inference_mode():
            images = self._model.encode_image(pixels)
            texts = self._model.encode_text(self._tokenizer([text]))
        return cosine(images, texts)


def cosine(image: Any, text: Any) -> float:
    """Return the cosine between two embeddings of shape [1, width]."""
    from torch.nn.functional import cosine_similarity

    return float(cosine_similarity(image.float(), text.float()).item())
