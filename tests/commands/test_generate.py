"""`twinlens generate` against real gRPC servers."""

import argparse
import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.errors import Unavailable
from services.commands import control
from services.commands.generate import add_generate_arguments, generate
from services.commands.sample import read_image
from services.gateway.generation import Began, Piece
from tests.gateway.fake_core import FOREVER, TIMINGS, FakeCore, grpc_server

Command = Callable[[argparse.Namespace], int]


def generate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("twinlens generate")
    add_generate_arguments(parser)
    return parser


async def run(core: FakeCore, *arguments: str) -> int:
    async with grpc_server(core) as target:
        parsed = generate_parser().parse_args([*arguments, "--grpc", target])
        return await asyncio.to_thread(generate, parsed)


async def test_the_answer_streams_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert await run(FakeCore(), "hi") == 0
    assert capsys.readouterr() == ("Hello\n", "")


async def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert await run(FakeCore(), "hi", "--json") == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert (answer["text"], answer["token_ids"], answer["finish_reason"]) == (
        "Hello",
        [10, 11, 12],
        "stop",
    )
    assert answer["usage"] == {
        "prompt_tokens": 9,
        "image_tokens": 4,
        "completion_tokens": 3,
        "cached_tokens": 2,
    }
    assert answer["timings"] == TIMINGS
    assert err == ""


async def test_every_option_reaches_the_gateway(tmp_path: Path) -> None:
    images = [tmp_path / "a.png", tmp_path / "b.png"]
    for image in images:
        image.write_bytes(image.name.encode())
    core = FakeCore()
    options = [
        "--max-tokens",
        "9",
        "--temperature",
        "0.5",
        "--top-p",
        "0.9",
        "--top-k",
        "4",
        "--seed",
        "7",
        "--stop",
        "x",
        "--stop",
        "y",
        "--ignore-eos",
        "--timeout",
        "60",
    ]
    assert (
        await run(core, "--image", str(images[0]), "--image", str(images[1]), "OCR:", *options) == 0
    )
    [asked] = core.requests
    assert asked.images == (b"a.png", b"b.png")
    assert json.loads(asked.prompt)[0]["content"] == [
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": "OCR:"},
    ]
    assert (
        asked.sampling.temperature,
        asked.sampling.top_p,
        asked.sampling.top_k,
        asked.sampling.seed,
    ) == (0.5, 0.9, 4, 7)
    assert (asked.stopping.max_tokens, asked.stopping.ignore_eos, asked.stopping.stop) == (
        9,
        True,
        ("x", "y"),
    )
    assert asked.timeout is not None and 50 < asked.timeout < 61


async def test_options_that_are_not_set_are_left_to_the_model() -> None:
    core = FakeCore()
    await run(core, "hi")
    [asked] = core.requests
    assert (
        asked.sampling.temperature,
        asked.sampling.top_k,
        asked.stopping.max_tokens,
        asked.timeout,
    ) == (None, None, None, None)


async def test_a_zero_temperature_is_sent_as_zero() -> None:
    core = FakeCore()
    await run(core, "hi", "--temperature", "0")
    assert core.requests[0].sampling.temperature == 0


@pytest.mark.parametrize("output", [[], ["--json"]])
async def test_a_failure_is_one_line_on_stderr(
    capsys: pytest.CaptureFixture[str], output: list[str]
) -> None:
    core = FakeCore(
        Began(None), Piece(0, [1], "x", []), Unavailable("llm was lost while it held the request")
    )
    assert await run(core, "hi", *output) == 1
    out, err = capsys.readouterr()
    # The log of the server, which is in this process, goes to stdout, too.
    assert re.sub(r"20\d\d-.*status=503\n", "", out) == ("" if output else "x")
    assert (
        err.count("\n") == 1 and err.startswith("twinlens: ") and "UNAVAILABLE: llm was lost" in err
    )


async def test_a_missing_image_is_reported_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    core = FakeCore()
    assert await run(core, "--image", str(tmp_path / "none.png"), "hi") == 1
    assert (
        capsys.readouterr().err
        == f"twinlens: cannot read {tmp_path}/none.png: no such file or directory\n"
    )
    assert core.requests == []


async def test_a_timeout_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    core = FakeCore(FOREVER)
    assert await run(core, "hi", "--timeout", "0.2") == 1
    assert "DEADLINE_EXCEEDED" in capsys.readouterr().err


async def test_if_nothing_listens_the_error_says_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    nowhere = "127.0.0.1:1"
    assert (
        await asyncio.to_thread(generate, generate_parser().parse_args(["hi", "--grpc", nowhere]))
        == 1
    )
    assert capsys.readouterr().err.startswith(
        f"twinlens: nothing answers at {nowhere}: start it with `twinlens serve`"
    )


@pytest.mark.parametrize("interrupted", [generate, control.status])
def test_ctrl_c_has_its_own_exit_status(
    monkeypatch: pytest.MonkeyPatch, interrupted: Command
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(grpc, "insecure_channel", interrupt)
    assert interrupted(generate_parser().parse_args(["hi"])) == 130


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["hi", "--max-tokens", "0"],
        ["hi", "--seed", "-1"],
        ["hi", "--seed", "x"],
        ["hi", "--temperature", "hot"],
        ["hi", "there"],
    ],
)
def test_wrong_use_exits_with_2(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        generate_parser().parse_args(wrong)
    assert caught.value.code == 2


async def test_read_image_returns_text_and_timings(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(b"picture")
    core = FakeCore()
    async with grpc_server(core) as target:
        assert await asyncio.to_thread(read_image, target, image, "OCR:") == (
            "Hello",
            TIMINGS,
        )
    assert core.requests[0].sampling.temperature == 0
