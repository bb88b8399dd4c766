"""The stages run on different hosts, and so do the ranks of one language group."""

import json
from typing import Any

import pytest

from common.settings import EMBEDDED_MODEL
from tests.system.hosts import Host, await_ready, start_front, two_hosts
from tests.system.running import GOLDEN, RECEIPT, until

pytestmark = pytest.mark.system
CASE = GOLDEN / "c_gqa_tp8"


@pytest.fixture
def hosts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Host, Host]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as pair:
        yield pair


def read_sample(host: Host) -> str:
    answered = host.twinlens(
        "generate",
        "--image",
        str(RECEIPT),
        "OCR:",
        "--temperature",
        "0",
        "--json",
        "--max-tokens",
        "8",
    )
    assert answered.returncode == 0, answered.stderr
    return json.loads(answered.stdout)["text"]


def test_vision_and_language_run_on_another_host_than_the_rest(hosts: tuple[Host, Host]) -> None:
    here, there = hosts
    start_front(here, EMBEDDED_MODEL)
    there.start("vision", here)
    there.start("llm", here, "--tp=2")
    await_ready(here)
    assert read_sample(here)
    ranks = sorted(member["rank"] for member in here.members() if member["role"] == "llm")
    assert ranks == [0, 1], "the first rank started the second"
    addresses = {
        member["role"]: member["address"].split(":")[1].strip("/")
        for member in here.members()
        if member["address"]
    }
    assert addresses == {
        "preprocess": here.address,
        "detokenizer": here.address,
        "vision": there.address,
        "llm": there.address,
    }


def test_ranks_of_one_group_on_two_hosts_return_the_reference(hosts: tuple[Host, Host]) -> None:
    expected = json.loads((CASE / "expected" / "expected.json").read_text())
    here, there = hosts
    model = CASE / "checkpoint"
    start_front(here, model)
    here.start("vision", here, f"--model={model}", "--dtype=float32")
    group = (
        f"--model={model}",
        "--dtype=float32",
        "--tp=2",
        f"--rendezvous=tcp://{here.address}:29500",
        "--kv-memory=100000000",
    )
    here.start("llm", here, *group, "--ordinal=llm-0")
    there.start("llm", here, *group, "--ordinal=llm-1")
    await_ready(here)
    ids = expected["greedy_rp105_ids"]
    asked = (
        "--image",
        str(CASE / "inputs" / "photo.png"),
        "What is shown in the image?",
        "--max-tokens",
        str(len(ids)),
    )
    answered = here.twinlens("generate", *asked, "--temperature", "0", "--ignore-eos", "--json")
    assert answered.returncode == 0, answered.stderr
    assert json.loads(answered.stdout)["token_ids"] == ids
    ranks = {
        member["rank"]: (member["group"], member["address"].split(":")[1].strip("/"))
        for member in here.members()
        if member["role"] == "llm"
    }
    assert ranks == {0: ("llm-0", here.address), 1: ("llm-0", there.address)}


def vision_members(host: Host) -> list[dict[str, Any]]:
    return [member for member in host.members() if member["role"] == "vision"]


def test_images_of_a_host_that_is_cut_off_are_encoded_on_another(hosts: tuple[Host, Host]) -> None:
    here, there = hosts
    start_front(here, EMBEDDED_MODEL)
    slow = there.start("vision", here, "--simulate-vision-ms=100000")
    here.start("llm", here)
    await_ready(here)
    pending = here.begin(
        "generate", "--image", str(RECEIPT), "OCR:", "--max-tokens", "2", "--ignore-eos", "--json"
    )
    until(
        lambda: any(member["in_flight"] for member in vision_members(here)),
        "the image is being encoded there",
    )
    here.start("vision", here, "--simulate-vision-ms=1")
    until(
        lambda: [member["state"] for member in vision_members(here)] == ["ready", "ready"],
        "another replica",
    )
    there.cut_off()
    out, err = pending.communicate(timeout=60)
    assert pending.returncode == 0, err
    assert json.loads(out)["usage"]["completion_tokens"] == 2
    assert slow.poll() is None, "it was cut off, not ended"
