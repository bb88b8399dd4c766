"""Reads the golden cases, and makes encoded images."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen2_5_vl"
WITH_IMAGES = ("a_image", "b_two_images_tied", "c_gqa_tp8")
CASES = (*WITH_IMAGES, "d_text")


def checkpoint_path(case: str) -> Path:
    return GOLDEN / case / "checkpoint"


def expected(case: str) -> dict[str, Any]:
    return json.loads((GOLDEN / case / "expected" / "expected.json").read_text())


def request(case: str) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Return a case's messages as preprocess gets them, and its image files in their order."""
    messages = json.loads((GOLDEN / case / "inputs" / "messages.json").read_text())
    files = []
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image_url":
                files.append((GOLDEN / case / "inputs" / part.pop("image_url")["url"]).read_bytes())
                part["type"] = "image"
    return messages, files


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return random pixels, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray | Image.Image, format: str = "PNG", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
