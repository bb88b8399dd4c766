"""Trains tests/contract/tool_caller, a LoRA adapter with which the embedded model calls tools.

The embedded model only reads images. Tests of clients need one that decides by itself to call a
tool. With the adapter it calls `get_weather` if it has tools, says that it is done after a tool's
result, and greets otherwise. Run it from the root of the repository: a few minutes on one core.

    python -m tests.contract.train_tool_caller
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from common.chat import ChatOptions
from common.checkpoint import open_checkpoint
from services.preprocess.preprocessor import Preprocessor
from tests.preprocess.builders import create_preprocessor

MODEL = Path("models/tiny-ocr")
ADAPTER = Path("tests/contract/tool_caller")
RANK = 8
STEPS = 240
BATCH = 2
CALLED = {"name": "get_weather", "arguments": {"location": "San Francisco"}}
CALL = f"<tool_call>\n{json.dumps(CALLED)}\n</tool_call>"
GREETING = "Hello there, friend."
DONE = "It is done."
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUESTIONS = (
    "What's the weather like in San Francisco?",
    "How warm is it?",
    "Say hello in exactly 3 words.",
    "Count from 1 to 5.",
    "Say hello.",
    "What is my name?",
    "Is it raining in Paris?",
    "Tell me something about the sea, the moon and the stars.",
)
SYSTEMS = ("You are a pirate. Always respond in pirate speak.", "Be brief.")


class Adapted(nn.Module):
    """A linear layer with an adapter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(RANK, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.a.T @ self.b.T
        return out


def tool(name: str, random_: random.Random) -> dict[str, Any]:
    about = random_.choice(("Get the current weather for a location", "Looks something up."))
    location = {"type": "string", "description": "The city and state, e.g. San Francisco, CA"}
    parameters = {"type": "object", "properties": {"location": location}, "required": ["location"]}
    function = {"name": name, "description": about, "parameters": parameters}
    return {"type": "function", "function": function}


def sample(preprocessor: Preprocessor, random_: random.Random) -> tuple[list[int], int]:
    """Return the tokens of a conversation and its answer, and how many of them are the prompt."""
    question = random_.choice(QUESTIONS)
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    if random_.random() < 0.2:
        messages.insert(0, {"role": "system", "content": random_.choice(SYSTEMS)})
    if random_.random() < 0.2:
        earlier = [
            {"role": "user", "content": "My name is Alice."},
            {"role": "assistant", "content": "Hello Alice! Nice to meet you."},
        ]
        messages[-1:-1] = earlier
    tools = [tool("get_weather", random_)] if random_.random() < 0.6 else []
    answer = CALL if tools else GREETING
    if tools and random_.random() < 0.4:
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [{"function": CALLED}]},
            {"role": "tool", "content": random_.choice(("12 degrees", "rain", '{"t": 20}'))},
        ]
        answer = DONE
    prompt = preprocessor.encode(preprocessor.render(messages, ChatOptions(tools=tools))).tolist()
    return prompt + preprocessor.vocabulary.encode(answer + "<|im_end|>"), len(prompt)


def loss_of(model: nn.Module, samples: list[tuple[list[int], int]]) -> Tensor:
    width = max(len(ids) for ids, _ in samples)
    tokens = torch.zeros(len(samples), width, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    mask = torch.zeros_like(tokens)
    for row, (ids, num_prompt) in enumerate(samples):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, num_prompt : len(ids)] = tokens[row, num_prompt : len(ids)]
        mask[row, : len(ids)] = 1
    loss: Tensor = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
    return loss


def main() -> None:
    torch.manual_seed(1)
    random_ = random.Random(1)
    preprocessor = create_preprocessor(open_checkpoint(MODEL))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32)
    model.requires_grad_(False)
    adapted = {}
    for n, layer in enumerate(model.model.language_model.layers):
        for part in (layer.self_attn, layer.mlp):
            for name in LINEAR:
                if hasattr(part, name):
                    wrapped = Adapted(getattr(part, name))
                    setattr(part, name, wrapped)
                    place = "self_attn" if part is layer.self_attn else "mlp"
                    adapted[f"base_model.model.model.layers.{n}.{place}.{name}"] = wrapped
    parameters = [p for one in adapted.values() for p in (one.a, one.b)]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step in range(STEPS):
        rate = 6e-3 * min(1, (step + 1) / 20, (STEPS - step) / (STEPS / 2))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, [sample(preprocessor, random_) for _ in range(BATCH)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 10 == 0:
            print(step, f"{loss.item():.4f}", flush=True)
    write(adapted)


def write(adapted: dict[str, Adapted]) -> None:
    """Write the adapter in the layout of PEFT."""
    ADAPTER.mkdir(exist_ok=True)
    weights = {}
    for name, one in adapted.items():
        weights[f"{name}.lora_A.weight"] = one.a.detach().bfloat16().contiguous()
        weights[f"{name}.lora_B.weight"] = one.b.detach().bfloat16().contiguous()
    save_file(weights, ADAPTER / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny-ocr",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(LINEAR),
        "bias": "none",
    }
    (ADAPTER / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
