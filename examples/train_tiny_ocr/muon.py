"""Muon for the matrices, AdamW for embeddings, norms, biases and heads."""

import torch
from torch import nn


def orthogonalise(gradients: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz in bf16 over a stack of equal matrices [n, rows, columns]."""
    x = gradients.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


def pieces(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A fused qkv is three matrices."""
    rows, columns = matrix.shape
    return matrix.split(columns) if rows == 3 * columns else (matrix,)


class Muon(torch.optim.Optimizer):
    def __init__(self, parameters: list[dict], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            stacks: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    for piece in zip(
                        pieces(parameter),
                        pieces(self.update(parameter, group["momentum"])),
                        strict=True,
                    ):
                        stacks.setdefault(piece[0].shape, []).append(piece)
            for (rows, columns), stack in stacks.items():
                steps = (
                    orthogonalise(torch.stack([update for _, update in stack]))
                    * max(1, rows / columns) ** 0.5
                )
                for (matrix, _), step in zip(stack, steps, strict=True):
                    matrix.sub_(step, alpha=group["lr"])

    def update(self, parameter: torch.Tensor, momentum: float) -> torch.Tensor:
        average = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        average.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """-> parameters for Muon, parameters for AdamW"""
    matrices = []
    rest = []
    for name, parameter in model.named_parameters():
        special = "embed_tokens" in name or "_head" in name
        (rest if parameter.ndim < 2 or special else matrices).append(parameter)
    return matrices, rest
