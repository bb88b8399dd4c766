"""`twinlens shard`: what it writes, and that the ranks serve from it."""

from pathlib import Path

import pytest
import torch

from common.checkpoint import BadCheckpoint, open_checkpoint
from common.sizing import Footprint
from services.llm.shard import write_parts
from tests.golden import GoldenCase, max_difference
from tests.llm.test_vlmo import case_of, inputs_of, model_of, on_ranks, pool


@pytest.mark.parametrize(("name", "world_size"), [("vqa_base", 2), ("retrieval_base", 4)])
def test_ranks_serve_from_their_own_files(name: str, world_size: int, tmp_path: Path) -> None:
    out = tmp_path / "cut"
    whole = open_checkpoint(case_of(name).checkpoint)
    write_parts(whole, world_size, out)
    inputs = [given for kind in inputs_of(name) for given in kind]
    alone = pool(model_of(name), inputs)
    cut = open_checkpoint(out)
    for found in on_ranks(cut, world_size, lambda model: pool(model, inputs)):
        assert max_difference(found.numpy(), alone.numpy()) < 1e-5
    assert cut.fingerprint != whole.fingerprint
    expected = Footprint(whole, 4).rank_bytes(world_size)
    assert Footprint(cut, 4).rank_bytes(world_size) == expected


def test_cut_weights_are_refused_with_another_number_of_ranks(tmp_path: Path) -> None:
    write_parts(open_checkpoint(case_of("vqa_base").checkpoint), 2, tmp_path / "cut")
    sizes = open_checkpoint(tmp_path / "cut").sizes
    sizes.check_fits(2)
    with pytest.raises(BadCheckpoint, match="cut for 2 ranks: use --tp 2"):
        sizes.check_fits(1)


def test_a_file_holds_plain_tensors_in_the_published_form(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(case_of("vqa_base").checkpoint)
    write_parts(checkpoint, 2, tmp_path / "cut")
    file = tmp_path / "cut" / "part_model" / "1" / "cut_VQA_weights.pt"
    part = torch.load(file, weights_only=True)
    stored = torch.load(checkpoint.weight_files[0], weights_only=True)
    block = "transformer.blocks.3"
    q, k, v = (rows.chunk(2)[1] for rows in stored[f"{block}.attn.qkv.weight"].chunk(3))
    assert torch.equal(part[f"{block}.attn.qkv.weight"], torch.cat((q, k, v)))
    for name, dim in (
        (f"{block}.attn.q_bias", 0),
        (f"{block}.mlp_vl.fc1.bias", 0),
        (f"{block}.mlp_vl.fc2.weight", 1),
        (f"{block}.attn.proj.weight", 1),
    ):
        assert torch.equal(part[name], stored[name].chunk(2, dim)[1])
    for name in (
        "relative_position_bias_table",
        f"{block}.mlp_vl.fc2.bias",
        f"{block}.attn.proj.bias",
        "transformer.patch_embed.proj.weight",
        "logit_scale",
    ):
        assert torch.equal(part[name], stored[name])


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(case_of("vqa_base").checkpoint)
    out = tmp_path / "cut"
    with pytest.raises(BadCheckpoint, match=r"^8 heads and an MLP of 256 .* use --tp 1, 2, 4, 8$"):
        write_parts(checkpoint, 3, out)
    write_parts(checkpoint, 2, out)
    with pytest.raises(BadCheckpoint, match="already"):
        write_parts(open_checkpoint(out), 2, tmp_path / "again")
    with pytest.raises(BadCheckpoint, match="exists"):
        write_parts(checkpoint, 2, out)
    with pytest.raises(BadCheckpoint, match="need not be cut"):
        write_parts(open_checkpoint(GoldenCase("a_image").checkpoint), 2, tmp_path / "other")


def test_a_missing_part_is_noticed(tmp_path: Path) -> None:
    out = tmp_path / "cut"
    write_parts(open_checkpoint(case_of("vqa_base").checkpoint), 4, out)
    (out / "part_model" / "2" / "cut_VQA_weights.pt").unlink()
    with pytest.raises(BadCheckpoint, match="no folder for each rank"):
        open_checkpoint(out)
