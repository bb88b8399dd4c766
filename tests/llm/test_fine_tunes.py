"""Fine-tunes of Qwen2.5-VL load in their published layouts, and compute what the base computes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.checkpoint import BadCheckpoint, open_checkpoint
from common.sizing import Footprint
from services.llm.families import load
from services.preprocess.chat_template import load as load_template
from services.vision.eager_tower import EagerTower
from tests.fine_tunes import LAYOUTS, FineTune, write
from tests.golden import GoldenCase, max_difference
from tests.llm.test_model_runner import CPU, forced_logits, runner_of
from tests.preprocess.builders import create_preprocessor
from tests.preprocess.cases import request
from tests.vision.test_qwen2_5_vl import embed, tower_of


@pytest.fixture(params=["a_image", "b_two_images_tied"])
def base(request: pytest.FixtureRequest) -> GoldenCase:
    return GoldenCase(request.param)


@pytest.fixture(params=LAYOUTS)
def tuned(request: pytest.FixtureRequest, base: GoldenCase, tmp_path: Path) -> FineTune:
    return write(base, request.param, tmp_path / "model")


def test_it_computes_what_the_base_computes(tuned: FineTune, base: GoldenCase) -> None:
    logits = forced_logits(runner_of(tuned), tuned, 1000)
    assert max_difference(logits, base.tensors["greedy_logits"]) < 1e-3
    embeddings = embed(EagerTower(tower_of(tuned)), tuned)
    assert max_difference(embeddings, base.tensors["image_embeds"]) < 1e-4


def test_it_prepares_what_the_base_prepares(tuned: FineTune, base: GoldenCase) -> None:
    checkpoint = open_checkpoint(tuned.checkpoint)
    given = open_checkpoint(base.checkpoint)
    assert checkpoint.dtype == given.dtype
    assert checkpoint.eos_token_ids == given.eos_token_ids
    assert checkpoint.family.placeholder_id(checkpoint) == given.config["image_token_id"]
    messages, files = request(base.name)
    assert load_template(tuned.checkpoint).render(messages) == base.expected["prompt_text"]
    preprocessor = create_preprocessor(checkpoint)
    grids = [preprocessor.prepare_item("image", file).grid_thw for file in files]
    assert [list(grid) for grid in grids] == base.expected["image_grid_thw"]


def test_a_head_that_is_not_needed_is_not_counted(tmp_path: Path) -> None:
    base = GoldenCase("b_two_images_tied")
    tuned = write(base, "twice", tmp_path / "model")
    told: list[float] = []
    model = load(open_checkpoint(tuned.checkpoint), torch.bfloat16, CPU, report_loading=told.append)
    footprint = Footprint(open_checkpoint(tuned.checkpoint), 2)
    assert footprint.rank_bytes(1) == model.num_bytes_read
    assert footprint.rank_bytes(1) == Footprint(open_checkpoint(base.checkpoint), 2).rank_bytes(1)
    assert told[-1] == 1


@pytest.mark.parametrize("layout", ["twice", "nested"])
@pytest.mark.parametrize("said", [(True, False), (False, True)])
def test_the_weights_decide_where_the_configuration_disagrees_about_the_head(
    tmp_path: Path, said: tuple[bool, bool], layout: str
) -> None:
    tuned = write(GoldenCase("b_two_images_tied"), layout, tmp_path / "model")
    file = tuned.checkpoint / "config.json"
    config = json.loads(file.read_text())
    config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"] = said
    file.write_text(json.dumps(config))
    with_head = forced_logits(runner_of(tuned), tuned, 1000)
    tensors = load_file(tuned.checkpoint / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tuned.checkpoint / "model.safetensors")
    assert max_difference(forced_logits(runner_of(tuned), tuned, 1000), with_head) < 1e-4


def test_a_processor_that_says_nothing_of_images_is_refused(tmp_path: Path) -> None:
    tuned = write(GoldenCase("a_image"), "twice", tmp_path / "model")
    file = tuned.checkpoint / "processor_config.json"
    file.write_text(json.dumps({"processor_class": "Qwen2_5_VLProcessor"}))
    with pytest.raises(BadCheckpoint, match=r"processor_config.json does not say how images"):
        assert open_checkpoint(tuned.checkpoint).preprocessor_config
    file.unlink()
    with pytest.raises(BadCheckpoint, match=r"preprocessor_config.json is missing"):
        open_checkpoint(tuned.checkpoint)
