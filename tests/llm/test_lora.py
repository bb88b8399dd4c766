"""LoRA adapters compute what a checkpoint computes into which they are merged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.checkpoint import BadCheckpoint, open_checkpoint
from common.lora import open_adapter
from services.llm.model_runner import ModelRunner
from services.llm.parallel import Shard
from tests.golden import GoldenCase, max_difference
from tests.llm.test_model_runner import (
    Sequence,
    ThreadGroup,
    blocks_of,
    forced_logits,
    runner_of,
    step,
)
from tests.llm.test_padded_heads import Remade, padded_case
from tests.lora import merge, write_adapter

CONFIGS: dict[str, dict[str, Any]] = {
    "all modules": {},
    "some modules": {"modules": ("q_proj", "v_proj", "down_proj")},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"k_proj": 2, "down_proj": 7},
        "alpha_pattern": {"v_proj": 3.5},
    },
}


def adapted_runner(
    case: GoldenCase, *adapters: Path, shard: Shard = Shard(), dtype: torch.dtype = torch.float32
) -> ModelRunner:
    """A runner with adapters 1, 2 and so on."""
    runner = runner_of(case, dtype, shard)
    for number, adapter in enumerate(adapters, 1):
        files = open_adapter(adapter, open_checkpoint(case.checkpoint), 64)
        runner.use_adapter(number, runner.prepare_adapter(files))
    return runner


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_an_adapter_computes_what_a_merged_checkpoint_computes(
    config: dict[str, Any], tmp_path: Path
) -> None:
    case = GoldenCase("a_image")
    adapter = write_adapter(tmp_path / "adapter", case.checkpoint, **config)
    merged = Remade("a_image", folder=merge(case.checkpoint, adapter, tmp_path / "merged"))
    runner = adapted_runner(case, adapter)
    found = forced_logits(runner, case, 33, adapter=1)
    expected = forced_logits(runner_of(merged), case, 33)
    assert max_difference(found, expected) < 1e-3
    assert (found.argmax(1) == expected.argmax(1)).all()
    plain = forced_logits(runner, case, 33)
    assert max_difference(plain, case.tensors["greedy_logits"]) < 1e-3
    assert max_difference(found, plain) > 0.1, "the adapter changes something"


@pytest.mark.parametrize(
    ("name", "world_size"), [("a_image", 2), ("c_gqa_tp8", 4), ("c_gqa_tp8", 8), ("padded", 8)]
)
def test_ranks_share_an_adapter(name: str, world_size: int, tmp_path: Path) -> None:
    case = padded_case(tmp_path / "model") if name == "padded" else GoldenCase(name)
    adapter = write_adapter(tmp_path / "adapter", case.checkpoint)
    merged = Remade(case.name, folder=merge(case.checkpoint, adapter, tmp_path / "merged"))
    expected = forced_logits(runner_of(merged), case, 33)
    for logits in ThreadGroup(world_size).run(
        lambda shard: forced_logits(adapted_runner(case, adapter, shard=shard), case, 33, 1)
    ):
        assert max_difference(logits, expected) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences_of_two_adapters_and_of_none_share_a_step(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    case = GoldenCase("a_image")
    adapters = [write_adapter(tmp_path / f"{n}", case.checkpoint, seed=n) for n in (1, 2)]
    runner = adapted_runner(case, *adapters, dtype=dtype)
    alone = [forced_logits(runner, case, 1000, adapter) for adapter in (0, 1, 2)]
    together = mixed_logits(runner, case, (0, 1, 2))
    for own, beside in zip(alone, together, strict=True):
        # Products of more rows add in another order.
        assert max_difference(own, beside) < (1e-3 if dtype is torch.float32 else 1.0)
    assert max_difference(together[1], together[2]) > 0.1
    without = mixed_logits(runner, case, (0, 0, 0))
    assert together[0].tobytes() == without[0].tobytes(), "others' adapters change no bit"


def mixed_logits(
    runner: ModelRunner, case: GoldenCase, adapters: tuple[int, ...]
) -> list[np.ndarray]:
    """The forced logits of sequences with these adapters, all in one batch."""
    sequences = [
        Sequence(case, blocks, adapter)
        for blocks, adapter in zip(blocks_of(len(adapters)), adapters, strict=True)
    ]
    rows = [step(runner, [(s, s.num_left) for s in sequences])]
    for token_id in case.expected["greedy_ids"][:-1]:
        for sequence in sequences:
            sequence.append(token_id)
        rows.append(step(runner, [(s, 1) for s in sequences]))
    return list(np.stack(rows, 1))


def test_a_dropped_adapter_is_gone(tmp_path: Path) -> None:
    case = GoldenCase("d_text")
    runner = adapted_runner(case, write_adapter(tmp_path / "a", case.checkpoint))
    runner.drop_adapter(1)
    with pytest.raises(KeyError):
        forced_logits(runner, case, 33, adapter=1)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(torch.nan, torch.float32), (torch.inf, torch.bfloat16), (1e5, torch.float16)],
)
def test_a_value_that_is_not_finite_is_refused(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    case = GoldenCase("d_text")
    adapter = write_adapter(tmp_path / "a", case.checkpoint, ("v_proj",))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if ".lora_A." in name)[0, 0] = value
    save_file(tensors, file)
    with pytest.raises(BadCheckpoint, match="not finite in torch"):
        adapted_runner(case, adapter, dtype=dtype)
