"""The language model, with guidance: heads that are told which image token to look at."""

from dataclasses import dataclass

import torch
from kernels import Rotation, attend, rotate, rotations
from layers import MLP, RMSNorm, linear
from settings import (
    MROPE_SECTION,
    ROPE_THETA,
    TEXT_DEPTH,
    TEXT_HEADS,
    TEXT_INNER,
    TEXT_KV_HEADS,
    TEXT_SIZE,
    VOCABULARY,
)
from torch import nn

HEAD_SIZE = TEXT_SIZE // TEXT_HEADS
GROUP = TEXT_HEADS // TEXT_KV_HEADS  # query heads that share a key


@dataclass
class Frame:
    """What all layers share in one forward pass."""

    q: Rotation
    k: Rotation
    mask: torch.Tensor


@dataclass
class Guide:
    """From position `first` on, the token to look at, and a weight that is 0 beyond the end of an
    answer."""

    first: int
    target: torch.Tensor
    weight: torch.Tensor

    def loss(self, scores: torch.Tensor) -> torch.Tensor:
        target = self.target[:, None, :, None].expand(-1, TEXT_KV_HEADS, -1, -1)
        right = scores.log_softmax(-1).gather(-1, target)[..., 0]
        return -(right * self.weight[:, None]).sum() / self.weight.sum() / TEXT_KV_HEADS


def positions(before: int, rows: int, columns: int, after: int) -> torch.Tensor:
    """-> [3, tokens]: the image's tokens differ in row and column, the others in time"""
    cells = rows * columns
    cell = torch.stack(
        [
            torch.zeros(cells),
            torch.arange(rows).repeat_interleave(columns),
            torch.arange(columns).repeat(rows),
        ]
    )
    text_after = torch.arange(after).expand(3, -1) + before + max(rows, columns)
    return torch.cat([torch.arange(before).expand(3, -1), cell + before, text_after], 1).float()


def frame(before: int, rows: int, columns: int, after: int) -> Frame:
    frequencies = ROPE_THETA ** (-torch.arange(HEAD_SIZE // 2).float() / (HEAD_SIZE // 2))
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(MROPE_SECTION))
    position = positions(before, rows, columns, after)
    length = position.shape[1]
    return Frame(
        *rotations(position[axis].T * frequencies), torch.full((length, length), -1e9).triu(1)
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = linear(TEXT_SIZE, TEXT_SIZE, True)
        self.k_proj = linear(TEXT_SIZE, TEXT_KV_HEADS * HEAD_SIZE, True)
        self.v_proj = linear(TEXT_SIZE, TEXT_KV_HEADS * HEAD_SIZE, True)
        self.o_proj = linear(TEXT_SIZE, TEXT_SIZE, False, zero=True)

    def forward(
        self, x: torch.Tensor, frame: Frame, guide: Guide | None, last: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v = (
            proj(t).unflatten(-1, (-1, HEAD_SIZE))
            for proj, t in ((self.q_proj, x[:, -last:]), (self.k_proj, x), (self.v_proj, x))
        )
        q = rotate(q, *(t[-last:] for t in frame.q)).transpose(1, 2)
        k = rotate(k, *frame.k).transpose(1, 2)
        loss = None
        if guide is not None:  # the first head of each group
            loss = guide.loss(
                (q[:, ::GROUP, guide.first :] @ k.mT).float() + frame.mask[guide.first :]
            )
        grouped = q.reshape(-1, TEXT_KV_HEADS, GROUP * last, HEAD_SIZE)
        out = attend(grouped, k, v.transpose(1, 2), frame.mask[-last:].repeat(GROUP, 1).to(q.dtype))
        return self.o_proj(
            out.view(-1, TEXT_HEADS, last, HEAD_SIZE).transpose(1, 2).flatten(2)
        ), loss


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(TEXT_SIZE)
        self.post_attention_layernorm = RMSNorm(TEXT_SIZE)
        self.self_attn = Attention()
        self.mlp = MLP(TEXT_SIZE, TEXT_INNER, False)

    def forward(
        self, x: torch.Tensor, frame: Frame, guide: Guide | None, last: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`last`: how many of the last positions go on; the final layer needs only the answer"""
        out, loss = self.self_attn(self.input_layernorm(x), frame, guide, last)
        x = x[:, -last:] + out
        return x + self.mlp(self.post_attention_layernorm(x)), loss


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, TEXT_SIZE)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        self.layers = nn.ModuleList(Layer() for _ in range(TEXT_DEPTH))
        self.norm = RMSNorm(TEXT_SIZE)
