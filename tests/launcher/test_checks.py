"""Settings that cannot work are refused before anything starts, by the name of their flag."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.address import bound_socket, host_port
from common.checkpoint import BadCheckpoint
from common.config import BadSetting
from common.settings import ServeSettings
from services.launcher.checks import check
from services.launcher.replicas import make_children, replica_counts
from tests.golden import GoldenCase
from tests.loopback import LOOPBACKS, free_port
from tests.system.running import GOLDEN

MODEL = GOLDEN / "a_image" / "checkpoint"


def settings(**changed: Any) -> ServeSettings:
    return ServeSettings(
        **{"model": str(MODEL), "http_port": free_port(), "grpc_port": free_port()} | changed
    )


def test_the_served_name_is_the_name_of_the_folder_unless_set() -> None:
    assert check(settings()).served_model_name == "checkpoint"
    assert check(settings(served_model_name="mine")).served_model_name == "mine"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tp": 0}, "--tp 0"),
        ({"vision": 0}, "--vision 0"),
        ({"preprocess": -1}, "--preprocess -1"),
        ({"vision_standby": -1}, "--vision-standby -1"),
        ({"autoscale": "vision=4"}, "--autoscale vision=4"),
        ({"autoscale": "vision=1:2", "vision": 3}, "--vision 3 with --autoscale vision=1:2"),
        ({"vision_buckets": "64,no"}, "--vision-buckets 64,no"),
        ({"max_model_len": 10**6}, "--max-model-len 1000000"),
        ({"http_port": 70_000}, "--http-port 70000"),
        ({"grpc_port": 0}, "--grpc-port 0"),
        ({"http_port": 9, "grpc_port": 9}, "both 9"),
        ({"host": "no.such.host.invalid"}, "no.such.host.invalid"),
        ({"read": "/no/such.png"}, "--read /no/such.png"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_its_flag(
    changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadSetting, match=words):
        check(settings(**changed))


def test_ranks_that_cannot_share_the_model_are_refused_before_anything_starts() -> None:
    with pytest.raises(BadCheckpoint, match="use --tp 1, 2, 4"):
        check(settings(tp=8))


VLMO = {"model": str(GoldenCase("vqa_base", "vlmo").checkpoint)}


def test_a_context_that_holds_no_whole_prompt_is_refused() -> None:
    with pytest.raises(BadSetting, match="--max-model-len 40: this model's prompts need"):
        check(settings(**VLMO, max_model_len=40))


def test_no_replica_is_started_that_the_model_does_not_need() -> None:
    counts = replica_counts(check(settings(**VLMO)))
    assert counts == {
        "controller": 1,
        "gateway": 1,
        "preprocess": 1,
        "llm": 1,
        "vision": 0,
        "detokenizer": 0,
    }
    assert min(replica_counts(check(settings())).values()) == 1


@pytest.mark.parametrize(
    "changed", [{"vision_standby": 1}, {"autoscale": "vision=1:2"}, {"vision_buckets": "16"}]
)
def test_settings_of_vision_replicas_are_refused_if_there_are_none(changed: dict[str, Any]) -> None:
    with pytest.raises(BadSetting, match="no vision replicas"):
        check(settings(**VLMO, **changed))


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        check(settings(model=str(tmp_path)))


def test_a_folder_that_is_no_vision_artefact_is_refused() -> None:
    with pytest.raises(BadCheckpoint, match="twinlens compile"):
        check(settings(vision_artefact=str(MODEL)))


def test_the_artefact_of_another_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = SimpleNamespace(fingerprint="other", model="its-name")
    artefact = SimpleNamespace(path="/artefact", manifest=manifest)
    monkeypatch.setattr("services.launcher.checks.open_artefact", lambda path: artefact)
    with pytest.raises(BadSetting, match=r"--vision-artefact /artefact.*its-name"):
        check(settings(vision_artefact="/artefact"))


def test_vision_replicas_and_no_others_start_from_the_artefact(tmp_path: Path) -> None:
    given = settings(vision_artefact="/artefact")
    for role in ("vision", "llm", "preprocess"):
        [child] = make_children(given, tmp_path, role, 0)
        assert ("--vision-artefact=/artefact" in child.arguments) == (role == "vision")


@pytest.mark.parametrize("host", LOOPBACKS)
def test_a_port_in_use_is_refused_by_its_flag(host: str) -> None:
    with bound_socket(host, 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            BadSetting,
            match=re.escape(f"--grpc-port {port}: cannot listen on {host_port(host, port)} ("),
        ):
            check(settings(host=host, grpc_port=port))
