"""Qwen2.5-VL, written for training on batches whose images share one grid.

The parameters carry the published tensor names, so `state_dict()` is the checkpoint apart from two
things that `exported()` does: the first layer sees luma only while training (it is expanded to 3
colours x 2 frames), and the heads of the extra losses are left out.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from data import IGNORED, Batch
from kernels import activation_dtype
from layers import linear
from safetensors.torch import load_file
from settings import CELL, CLASSES, IMAGE_STD, LUMA, PATCH, SLOTS, TEXT_SIZE, VOCABULARY
from text import Guide, LanguageModel, frame
from torch import nn
from vision import GREY_STD, VisionTower

# Which layers' attention is guided, and to what: the cell of the character just read, or of the
# next.
GUIDED = {1: "current", 2: "next", 3: "next"}
TRACKED = 2  # after this layer the slots of both must be known
TRAINING_HEADS = ("slot_head", "track_head")
PATCH_WEIGHT = "visual.patch_embed.proj.weight"


@dataclass
class Reading:
    cells: torch.Tensor  # the image's embeddings
    logits: torch.Tensor  # for each token of the answer
    guidance: torch.Tensor  # loss


def misplace(fed: torch.Tensor, source: torch.Tensor) -> None:
    """Puts short pieces of an answer in wrong places, one for 20 characters."""
    length = int((source > 0).sum())
    for _ in range(length // 20 if length >= 12 else 0):
        size = int(torch.randint(1, 5, ()))
        to, come = torch.randint(0, length - size, (2,)).tolist()
        piece = source[come : come + size]
        if (piece > 31).all() and (source[to : to + size] > 31).all():
            fed[to : to + size] = piece


def misread(answers: torch.Tensor, noise: float) -> torch.Tensor:
    """Answers with wrong characters, as the model will feed them to itself.

    Whoever finds the place by what was just read alone would jump to where a misplaced piece came
    from."""
    wrong = (torch.rand(answers.shape) < noise) & (answers > 31)
    fed = torch.where(wrong, torch.randint(33, 127, answers.shape), answers)
    for row, source in zip(fed, answers, strict=True):
        misplace(row, source)
    return fed


class TinyOCR(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = VisionTower()
        self.model = LanguageModel()
        self.lm_head = linear(TEXT_SIZE, VOCABULARY, False)
        # for training only: the characters in a cell's slots; the slots of the current and the next
        # character
        self.slot_head = linear(TEXT_SIZE, SLOTS * CLASSES, True)
        self.track_head = linear(TEXT_SIZE, 2 * SLOTS, True)

    def see(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(images, activation_dtype())

    def slot_loss(
        self, cells: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> loss, share of the characters named right"""
        logits = self.slot_head(cells).view(-1, CLASSES).float()
        slots = slots.flatten()
        character = slots > 1  # neither nothing nor a space
        return F.cross_entropy(logits, slots), (logits.argmax(-1) == slots)[
            character
        ].float().mean()

    def track_loss(
        self, x: torch.Tensor, current: torch.Tensor, following: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        chances = self.track_head(x).float().unflatten(-1, (2, SLOTS)).log_softmax(-1)
        slots = torch.stack([current % SLOTS, following % SLOTS], -1)[..., None]
        return -(chances.gather(-1, slots)[..., 0] * weight[..., None]).sum() / weight.sum() / 4

    def embed(self, batch: Batch, cells: torch.Tensor, noise: float) -> torch.Tensor:
        fed = batch.answers[:, :-1].clamp(min=0)
        fed = misread(fed, noise) if noise else fed
        look_up = self.model.embed_tokens
        count = len(fed)
        before, after = (
            look_up(tokens).expand(count, -1, -1) for tokens in (batch.before, batch.after)
        )
        return torch.cat([before, cells.float(), after, look_up(fed)], 1).float()

    def forward(self, batch: Batch, noise: float = 0.0) -> Reading:
        """`noise`: share of the characters fed back that are wrong, so that reading survives a
        misread one"""
        cells = self.see(batch.images)
        x = self.embed(batch, cells, noise)
        length = x.shape[1]
        answer = batch.answers.shape[1]
        before = len(batch.before)
        rows = batch.images.shape[1] // CELL
        columns = batch.images.shape[2] // CELL
        shared = frame(before, rows, columns, length - before - rows * columns)
        following = batch.places
        current = torch.cat([following[:, :1], following[:, :-1]], 1)
        weight = (batch.answers != IGNORED).float()
        guides = {
            n: Guide(length - answer, p // SLOTS + before, weight)
            for n, p in (("current", current), ("next", following))
        }
        guidance = x.new_zeros(())
        for i, layer in enumerate(self.model.layers):
            final = i == len(self.model.layers) - 1
            x, loss = layer(x, shared, guides.get(GUIDED.get(i, "")), answer if final else length)
            if loss is not None:
                guidance = guidance + loss / len(GUIDED)
            if i == TRACKED:
                guidance = guidance + self.track_loss(x[:, -answer:], current, following, weight)
        return Reading(cells, self.lm_head(self.model.norm(x)).float(), guidance)


def colour_shares() -> torch.Tensor:
    """A colour reaches the network as (c - mean) / std; weights luma * std over two equal frames
    make the sum what the grey image gave."""
    shares = torch.tensor([luma * std for luma, std in zip(LUMA, IMAGE_STD, strict=True)])
    return shares.view(1, 3, 1, 1, 1) / (2 * GREY_STD)


@torch.no_grad()
def exported(model: TinyOCR) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors in fp32."""
    tensors = {
        name: t.detach().clone()
        for name, t in model.state_dict().items()
        if not name.startswith(TRAINING_HEADS)
    }
    grey = tensors[PATCH_WEIGHT].view(-1, 1, 1, PATCH, PATCH)
    tensors[PATCH_WEIGHT] = (grey * colour_shares()).expand(-1, -1, 2, -1, -1).contiguous()
    return tensors


def load_exported(model: TinyOCR, folder: Path) -> None:
    """The reverse; the heads of the extra losses keep what they have."""
    tensors = {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}
    tensors[PATCH_WEIGHT] = (tensors[PATCH_WEIGHT].sum((1, 2)) / colour_shares().sum() / 2).flatten(
        1
    )
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or any(not name.startswith(TRAINING_HEADS) for name in missing):
        raise ValueError(
            f"{folder} is not a checkpoint of this architecture: missing {missing}, unexpected "
            f"{unexpected}"
        )


def parameter_count(model: TinyOCR) -> int:
    return sum(
        p.numel() for name, p in model.named_parameters() if not name.startswith(TRAINING_HEADS)
    )
