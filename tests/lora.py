"""Random LoRA adapters for golden checkpoints, and checkpoints into which they are merged."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from common.checkpoint import open_checkpoint
from common.lora import modules_of

PREFIX = "base_model.model."


def write_adapter(
    folder: Path,
    model: Path,
    modules: tuple[str, ...] = (),
    seed: int = 0,
    rank: int = 4,
    alpha: float = 24.0,
    **config: Any,
) -> Path:
    """Write an adapter that changes the named modules of each layer, or all that may change."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (num_outputs, num_inputs) in modules_of(open_checkpoint(model)).items():
        if modules and not name.endswith(modules):
            continue
        own = config.get("rank_pattern", {}).get(name.rpartition(".")[2], rank)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(own, num_inputs, generator=random)
        up = torch.randn(num_outputs, own, generator=random)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = up * (0.05 / num_inputs**0.5)
    save_file(tensors, folder / "adapter_model.safetensors")
    given = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(given))
    return folder


def scale_of(config: dict[str, Any], module: str, rank: int) -> float:
    """Return alpha / r, or alpha / sqrt(r), as PEFT computes it."""
    alpha = config.get("alpha_pattern", {}).get(module.rpartition(".")[2], config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def merge(model: Path, adapter: Path, out: Path) -> Path:
    """Write the checkpoint with an adapter added to its weights in float32."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.bin", "*.bin.index.json"))
    family = open_checkpoint(model).family
    tensors = {name: tensor.float() for name, tensor in tensors_of(model).items()}
    stored = {family.canonical_name(name): name for name in tensors}
    config = json.loads((adapter / "adapter_config.json").read_text())
    pairs = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in pairs if ".lora_A." in name]:
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        up = pairs[name.replace(".lora_A.", ".lora_B.")]
        weight = tensors[stored[family.canonical_name(f"{module}.weight")]]
        weight += scale_of(config, module, len(pairs[name])) * (up @ pairs[name])
    save_file(tensors, out / "model.safetensors")
    return out


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    if (file := model / "model.safetensors").exists():
        return load_file(file)
    parts = (torch.load(file, weights_only=True) for file in sorted(model.glob("*.bin")))
    return {name: tensor for part in parts for name, tensor in part.items()}
