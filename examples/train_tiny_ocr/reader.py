"""Reads images with transformers' greedy generate, through the chat template: what the tables are
measured with."""

from pathlib import Path

import torch
from PIL import Image
from settings import CELL, PATCH, ROLM_PROMPT
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil


class Reader:
    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

    def tokens(self, prompt: str, system: str | None, image_tokens: int) -> torch.Tensor:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "system", "content": system}] * (system is not None) + [
            {"role": "user", "content": content}
        ]
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer(
            text.replace("<|image_pad|>", "<|image_pad|>" * image_tokens), return_tensors="pt"
        )["input_ids"]

    @torch.no_grad()
    def read(
        self,
        image: Image.Image,
        prompt: str = ROLM_PROMPT,
        system: str | None = None,
        longest: int = 2000,
    ) -> str:
        pixels = self.image_processor(images=[image.convert("RGB")], return_tensors="pt")
        tokens = self.tokens(prompt, system, len(pixels["pixel_values"]) // (CELL // PATCH) ** 2)
        image_token = self.model.config.image_token_id
        out = self.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=(tokens == image_token).int(),
            max_new_tokens=longest,
            do_sample=False,
            **pixels,
        )
        return self.tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)


def edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner = row[0]
        row[0] = i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]
