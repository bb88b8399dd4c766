"""`twinlens plan` computes from the checkpoint's files and from set or measured stage times."""

import json
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from benchmarks.families.qwen2_5_vl import (
    COPIED,
    SHAPES,
    config_of,
    language_tensors,
    vision_tensors,
)
from common.checkpoint import Checkpoint
from common.families import FAMILIES, ModelSizes
from common.families.qwen2_5_vl import Qwen25VL
from common.settings import EMBEDDED_MODEL, PlanSettings
from services.commands import plan
from services.commands.client import ClientError
from services.commands.stage_times import StageTimes
from tests.golden import GoldenCase
from tests.quantized import FORMATS, quantize

PUBLISHED_7B_BYTES = 16_584_333_312
"""total_size in model.safetensors.index.json of https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct.
"""


def planned(
    capsys: pytest.CaptureFixture[str], settings: PlanSettings
) -> tuple[int, list[str], str]:
    status = plan.plan(settings)
    out, err = capsys.readouterr()
    return status, out.splitlines(), err


@pytest.fixture(scope="module")
def published_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the names and shapes of the 7B model, in a sparse file without contents."""
    path = tmp_path_factory.mktemp("7b")
    shapes = SHAPES["7b"]
    entries = {}
    end = 0
    for name, shape in (*language_tensors(shapes), *vision_tensors(shapes)):
        begin = end
        end = end + 2 * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    assert end == PUBLISHED_7B_BYTES
    (path / "config.json").write_text(json.dumps(config_of(shapes)))
    for name in (*COPIED, "tokenizer.json", "preprocessor_config.json"):
        shutil.copy(EMBEDDED_MODEL / name, path)
    return path


def test_the_memory_of_a_7b_model_is_what_it_is_known_to_be(
    published_7b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = PlanSettings(
        model=str(published_7b), dtype="bfloat16", max_model_len=32768, card_gib=24
    )
    status, lines, _ = planned(capsys, settings)
    assert status == 0
    assert "1.3 GiB of weights" in lines[1]
    cells = {line.split()[0]: line.split() for line in lines if line.strip()[:1].isdigit()}
    assert cells["1"] == ["1", "14.2", "GiB", "56.0", "KiB", "1.8", "GiB", "93900"]
    assert cells["4"][:5] == ["4", "3.5", "GiB", "14.0", "KiB"]
    assert cells["8"][:7] == ["8", "1.8", "GiB", "14.0", "KiB", "448.0", "MiB"], "padded heads"


def test_a_card_that_cannot_hold_a_whole_context_is_marked(
    published_7b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, lines, _ = planned(
        capsys, PlanSettings(model=str(published_7b), max_model_len=32768, card_gib=16)
    )
    marked = {line.split()[0] for line in lines if line.endswith("too few")}
    assert marked == {"1"}


def test_every_number_of_ranks_that_the_service_accepts_is_listed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, lines, _ = planned(capsys, PlanSettings(model=str(GoldenCase("c_gqa_tp8").checkpoint)))
    assert [line.split()[0] for line in lines if line.strip()[:1].isdigit()] == ["1", "2", "4", "8"]
    assert not any("does not divide" in line for line in lines)


class OneStep(Qwen25VL):
    """A family that computes images and texts in one step of the language group."""

    tower_prefixes = ()
    needed_roles = ("llm",)

    def sizes(self, checkpoint: Checkpoint) -> ModelSizes:
        return replace(super().sizes(checkpoint), num_heads=4, num_kv_heads=0)

    def num_shares(self, name: str, sizes: ModelSizes, world_size: int) -> int:
        return world_size


@pytest.mark.parametrize("card_gib", [0.0, 1.0, 0.001])
def test_a_model_of_one_step_has_neither_tower_nor_cache(
    card_gib: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "qwen2_5_vl", OneStep())
    model = str(GoldenCase("a_image").checkpoint)
    status, lines, _ = planned(capsys, PlanSettings(model=model, card_gib=card_gib))
    assert status == 0 and lines[1].startswith("no vision replicas")
    rows = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert [row[3] for row in rows[:3]] == ["none"] * 3
    assert rows[3] == ["8", "does", "not", "divide", "this", "model"]
    assert not any("replica" in line for line in lines[2:])
    assert rows[0][-1] == {0.0: "none", 1.0: "MiB", 0.001: "small"}[card_gib]


def test_a_dtype_without_a_size_is_refused_by_its_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(GoldenCase("a_image").checkpoint, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"torch_dtype": "float64"}
    (model / "config.json").write_text(json.dumps(config))
    status, _, err = planned(capsys, PlanSettings(model=str(model)))
    assert status == 2 and "--dtype" in err and "float64" in err


def test_quantized_weights_are_planned_as_they_are_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = quantize(GoldenCase("a_image"), FORMATS["awq"], tmp_path)
    quantized, meant = (
        planned(capsys, PlanSettings(model=str(case.checkpoint), dtype="bfloat16"))[1]
        for case in (pair.quantized, pair.meant)
    )
    assert " in bfloat16 with quantized weights, " in quantized[0]
    assert " in bfloat16, " in meant[0]
    assert quantized[1] == meant[1], "the vision tower is not quantized"
    sizes = [lines[4].split()[1:3] for lines in (quantized, meant)]
    assert sizes == [["609.2", "KiB"], ["1.4", "MiB"]]
    settings = PlanSettings(model=str(pair.quantized.checkpoint), dtype="float32")
    assert " in float32, " in planned(capsys, settings)[1][0]


@pytest.mark.parametrize(
    ("family", "case", "title"),
    [
        ("qwen2_5_vl", "d_text", "Qwen2.5-VL"),
        ("qwen_vl", "a_chat_image", "Qwen-VL"),
        ("wemm", "a_image", "WeMM"),
    ],
)
def test_every_family_can_be_planned(
    family: str, case: str, title: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(GoldenCase(case, family).checkpoint)
    status, lines, _ = planned(capsys, PlanSettings(model=model, card_gib=1))
    assert status == 0 and title in lines[0]
    assert [line.split()[0] for line in lines if line.strip()[:1].isdigit()] == ["1", "2", "4", "8"]


@pytest.mark.parametrize(
    ("vision_seconds", "rate", "images", "expected"),
    [
        (0.5, 4.0, 1.0, "2.00 vision replicas busy: 2"),
        (0.5, 4.0, 1.1, "2.20 vision replicas busy: 3"),
        (0.01, 1.0, 1.0, "busy: 1"),
    ],
)
def test_replicas_follow_from_the_times_set(
    vision_seconds: float,
    rate: float,
    images: float,
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = PlanSettings(
        vision_seconds=vision_seconds, group_rate=rate, images_per_request=images
    )
    assert expected in planned(capsys, settings)[1][-1]


def test_replicas_follow_from_the_times_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "measure", lambda *_: StageTimes(0.02, 0.25, 10.0))
    _, lines, _ = planned(capsys, PlanSettings(image=__file__))
    assert any("50.0 a second" in line for line in lines)
    assert "2.50 vision replicas busy: 3" in lines[-1]


def test_without_times_it_says_how_to_get_them_and_does_not_guess(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, lines, _ = planned(capsys, PlanSettings())
    assert status == 0
    assert "--image" in lines[-2] and not any("busy" in line for line in lines)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (PlanSettings(model="/nowhere"), "/nowhere"),
        (PlanSettings(image="/no/picture.png"), "--image /no/picture.png"),
        (PlanSettings(vision_seconds=1.0), "--group-rate"),
        (PlanSettings(concurrency=0), "--concurrency"),
    ],
)
def test_invalid_settings_are_refused_by_name(
    settings: PlanSettings, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = planned(capsys, settings)
    assert status == 2 and named in err


def test_a_system_that_does_not_answer_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> StageTimes:
        raise ClientError("nothing answers at x:1")

    monkeypatch.setattr(plan, "measure", refuse)
    status, _, err = planned(capsys, PlanSettings(image=__file__))
    assert status == 1 and "nothing answers" in err
