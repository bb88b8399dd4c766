"""What a rank prepares before it works: the size of its KV cache, and the runner for its device."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.checkpoint import Checkpoint, open_checkpoint
from common.config import BadSetting
from common.families.family import TP_SIZES
from common.settings import LlmSettings
from common.sizing import Footprint
from compute.device import Device
from compute.torch_tensors import DTYPES
from services.llm import startup
from services.llm.model_runner import ModelRunner
from services.llm.parallel import Shard
from services.llm.pooling_runner import PoolingRunner
from services.llm.startup import KvCache, check_settings, count_blocks, make_runner, tokens_of_step
from tests.golden import CASES, GoldenCase

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "case",
    [
        *map(GoldenCase, CASES),
        GoldenCase("a_chat_image", "qwen_vl"),
        GoldenCase("b_long_ntk_logn", "qwen_vl"),
        GoldenCase("a_image", "wemm"),
        GoldenCase("a_image_renamed", "wemm"),
    ],
    ids=lambda case: f"{case.family}-{case.name}",
)
def test_weight_bytes_are_those_that_are_loaded(case: GoldenCase) -> None:
    checkpoint = open_checkpoint(case.checkpoint)
    stored = DTYPES[checkpoint.dtype]
    for world_size in filter(checkpoint.sizes.fits, TP_SIZES):
        shard = Shard(world_size - 1, world_size)
        read = ModelRunner(checkpoint, stored, CPU, 1, 16, shard=shard).num_bytes_read
        assert Footprint(checkpoint, stored.itemsize).rank_bytes(world_size) == read
        assert Footprint(checkpoint, 2).rank_bytes(world_size) == read // stored.itemsize * 2


@pytest.mark.parametrize("name", ["vqa_base", "vqa_base_plus", "retrieval_base"])
def test_a_rank_reads_the_weights_of_vlmo_that_are_planned(name: str) -> None:
    checkpoint = open_checkpoint(GoldenCase(name, "vlmo").checkpoint)
    for world_size in filter(checkpoint.sizes.fits, TP_SIZES):
        shard = Shard(world_size - 1, world_size)
        runner = PoolingRunner(checkpoint, torch.float32, CPU, shard=shard)
        assert Footprint(checkpoint, 4).rank_bytes(world_size) == runner.num_bytes_read


def test_a_step_has_room_for_several_whole_prompts() -> None:
    generating = open_checkpoint(GoldenCase("d_text").checkpoint)
    pooling = open_checkpoint(GoldenCase("vqa_base", "vlmo").checkpoint)
    settings = LlmSettings(max_num_batched_tokens=10)
    assert tokens_of_step(settings, generating) == 10
    assert tokens_of_step(settings, pooling) == 8 * pooling.max_model_len


def test_a_rank_names_its_card_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter is loaded by another thread, whose current card is the first one."""

    class Met(Exception):
        pass

    def meet(settings: LlmSettings, checkpoint: Checkpoint, device: Device, member: Any) -> Any:
        raise Met(device.torch_device)

    cuda = Device(torch.device("cuda"))
    monkeypatch.setattr(startup, "prepare", lambda *given: (cuda, torch.float32))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(startup, "join_control_plane", lambda *given: SimpleNamespace(id="llm"))
    monkeypatch.setattr(startup, "meet_other_ranks", meet)
    settings = LlmSettings(tp=2, rank=1, rendezvous="file:///nowhere")
    stop: Any = None
    with pytest.raises(Met) as caught:
        startup.run_rank(settings, open_checkpoint(GoldenCase("d_text").checkpoint), stop)
    assert caught.value.args == (torch.device("cuda", 1),)


def test_the_cpu_has_the_plain_runner() -> None:
    checkpoint = open_checkpoint(GoldenCase("d_text").checkpoint)
    member: Any = SimpleNamespace(report_loading=lambda fraction: None)
    runner = make_runner(
        LlmSettings(max_num_seqs=8),
        checkpoint,
        Device(CPU),
        torch.float32,
        Shard(),
        KvCache(num_blocks=4, block_size=16, bytes_per_block=1),
        member,
        attention=None,
    )
    assert type(runner) is ModelRunner


def test_a_group_refuses_a_context_that_the_model_cannot_be_served_with() -> None:
    checkpoint = open_checkpoint(GoldenCase("vqa_base", "vlmo").checkpoint)
    for refused in (checkpoint.max_model_len - 1, checkpoint.max_model_len + 1):
        with pytest.raises(BadSetting, match=f"--max-model-len {refused}"):
            check_settings(LlmSettings(max_model_len=refused), checkpoint)
    check_settings(LlmSettings(max_model_len=checkpoint.max_model_len), checkpoint)


def test_blocks_hold_at_least_one_request_of_full_length() -> None:
    assert count_blocks(1000, 10, 16, max_num_seqs=4, max_model_len=160) == 40
    assert count_blocks(200, 10, 16, max_num_seqs=4, max_model_len=160) == 20
    with pytest.raises(BadSetting, match="--kv-memory 100"):
        count_blocks(99, 10, 16, max_num_seqs=4, max_model_len=160)


def test_a_model_without_keys_and_values_has_a_block_for_every_token() -> None:
    assert count_blocks(0, 0, 16, max_num_seqs=4, max_model_len=160) == 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp": 2, "rank": 2, "rendezvous": "tcp://h:1"}, "count from 0 to 1"),
        ({"tp": 2, "rank": 1}, "needs --rendezvous"),
    ],
)
def test_a_rank_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    checkpoint = open_checkpoint(GoldenCase("c_gqa_tp8").checkpoint)
    with pytest.raises(BadSetting, match=message):
        check_settings(LlmSettings(**settings), checkpoint)
