"""The exported checkpoint gives the training model's logits in transformers (fp32).

python check_export.py run/last.pt
"""

import random
import sys
import tempfile
from pathlib import Path

import export
import torch
from data import Batch, make_batch
from kinds import HELD_OUT
from model import TinyOCR
from PIL import Image
from settings import CELL, TOKEN
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

TOLERANCE = 1e-3  # logits reach about 30


class Published:
    """The same weights in transformers."""

    def __init__(self, model: TinyOCR) -> None:
        with tempfile.TemporaryDirectory() as folder:
            export.write(model, Path(folder), torch.float32)
            self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                folder, dtype=torch.float32
            ).eval()
            self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

    def logits(self, batch: Batch, index: int) -> torch.Tensor:
        """For each token of one answer, padding included"""
        image = batch.images[index]
        cells = image.numel() // CELL**2
        pixels = self.image_processor(
            images=[Image.fromarray(image.numpy()).convert("RGB")], return_tensors="pt"
        )
        answer = batch.answers[index].clamp(min=0)
        image_tokens = torch.full((cells,), TOKEN["<|image_pad|>"])
        tokens = torch.cat([batch.before, image_tokens, batch.after, answer[:-1]])[None]
        out = self.model(
            input_ids=tokens, mm_token_type_ids=(tokens == TOKEN["<|image_pad|>"]).int(), **pixels
        )
        return out.logits[0, -len(answer) :]


@torch.no_grad()
def largest_difference(ours: TinyOCR, theirs: Published, batch: Batch) -> float:
    logits = ours(batch).logits
    return max((theirs.logits(batch, i) - logits[i]).abs().max().item() for i in range(len(logits)))


def main() -> None:
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    ours = export.load(Path(sys.argv[1])).eval()
    theirs = Published(ours)
    rng = random.Random(5)
    for name, kind in HELD_OUT.items():
        difference = largest_difference(ours, theirs, make_batch(rng, *kind, budget=400, long=True))
        print(f"{name}: largest difference {difference:.1e}")
        if difference > TOLERANCE:
            raise ValueError(
                f"the exported model reads {name} otherwise than the training code: model.py or "
                "export.py is wrong"
            )


if __name__ == "__main__":
    main()
