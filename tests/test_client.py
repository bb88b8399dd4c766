"""`twinlens generate` and `twinlens status` against real gRPC servers."""

import argparse
import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.errors import Unavailable
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from services import client
from services.gateway.generation import Began, Piece
from tests.gateway.fake_core import FOREVER, TIMINGS, FakeCore, grpc_door

Command = Callable[[argparse.Namespace], int]


def generate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("twinlens generate")
    client.add_generate_arguments(parser)
    return parser


async def generate(core: FakeCore, *arguments: str) -> int:
    async with grpc_door(core) as target:
        parsed = generate_parser().parse_args([*arguments, "--grpc", target])
        return await asyncio.to_thread(client.generate, parsed)


async def status(target: str, *arguments: str) -> int:
    parser = argparse.ArgumentParser("twinlens status")
    client.add_status_arguments(parser)
    return await asyncio.to_thread(client.status, parser.parse_args([*arguments, "--grpc", target]))


async def test_the_answer_streams_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert await generate(FakeCore(), "hi") == 0
    assert capsys.readouterr() == ("Hello\n", "")


async def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert await generate(FakeCore(), "hi", "--json") == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert (answer["text"], answer["token_ids"], answer["finish_reason"]) == ("Hello", [10, 11, 12], "stop")
    assert answer["usage"] == {"prompt_tokens": 9, "image_tokens": 4, "completion_tokens": 3, "cached_tokens": 2}
    assert answer["timings"] == TIMINGS
    assert err == ""


async def test_every_option_arrives(tmp_path: Path) -> None:
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
    assert await generate(core, "--image", str(images[0]), "--image", str(images[1]), "OCR:", *options) == 0
    [asked] = core.requests
    assert asked.images == (b"a.png", b"b.png")
    assert json.loads(asked.prompt)[0]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "OCR:"}]
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.sampling.top_k, asked.sampling.seed) == (0.5, 0.9, 4, 7)
    assert (asked.stopping.max_tokens, asked.stopping.ignore_eos, asked.stopping.stop) == (9, True, ("x", "y"))
    assert asked.timeout is not None and 50 < asked.timeout < 61


async def test_options_that_are_not_given_are_left_to_the_model() -> None:
    core = FakeCore()
    await generate(core, "hi")
    [asked] = core.requests
    assert (asked.sampling.temperature, asked.sampling.top_k, asked.stopping.max_tokens, asked.timeout) == (None, None, None, None)


async def test_a_zero_temperature_is_not_an_absent_one() -> None:
    core = FakeCore()
    await generate(core, "hi", "--temperature", "0")
    assert core.requests[0].sampling.temperature == 0


@pytest.mark.parametrize("output", [[], ["--json"]])
async def test_a_failure_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str], output: list[str]) -> None:
    core = FakeCore(Began(None), Piece(0, [1], "x", []), Unavailable("llm was lost while it held the request"))
    assert await generate(core, "hi", *output) == 1
    out, err = capsys.readouterr()
    assert out == ("" if output else "x")
    assert err.count("\n") == 1 and err.startswith("twinlens: ") and "UNAVAILABLE: llm was lost" in err


async def test_a_missing_image_is_told_before_anything_is_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    core = FakeCore()
    assert await generate(core, "--image", str(tmp_path / "none.png"), "hi") == 1
    assert capsys.readouterr().err == f"twinlens: cannot read {tmp_path}/none.png: no such file or directory\n"
    assert core.requests == []


async def test_a_timeout_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    core = FakeCore(FOREVER)
    assert await generate(core, "hi", "--timeout", "0.2") == 1
    assert "DEADLINE_EXCEEDED" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "status"])
async def test_where_nothing_listens_the_client_says_what_to_do(capsys: pytest.CaptureFixture[str], command: str) -> None:
    nowhere = "127.0.0.1:1"
    if command == "status":
        code = await status(nowhere)
    else:
        code = await asyncio.to_thread(client.generate, generate_parser().parse_args(["hi", "--grpc", nowhere]))
    assert code == 1
    assert capsys.readouterr().err.startswith(f"twinlens: nothing answers at {nowhere}: start it with `twinlens serve`")


async def test_a_gateway_without_its_controller_is_not_told_as_absent(capsys: pytest.CaptureFixture[str]) -> None:
    async with grpc_door(FakeCore()) as target:
        assert await status(target) == 1
        assert capsys.readouterr().err.startswith(f"twinlens: {target} says UNAVAILABLE: the controller does not answer")


@pytest.mark.parametrize("interrupted", [client.generate, client.status])
def test_ctrl_c_has_its_own_exit_status(monkeypatch: pytest.MonkeyPatch, interrupted: Command) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(grpc, "insecure_channel", interrupt)
    assert interrupted(generate_parser().parse_args(["hi"])) == 130


@pytest.mark.parametrize(
    "wrong",
    [[], ["hi", "--max-tokens", "0"], ["hi", "--seed", "-1"], ["hi", "--seed", "x"], ["hi", "--temperature", "hot"], ["hi", "there"]],
)
def test_wrong_use_exits_with_2(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        generate_parser().parse_args(wrong)
    assert caught.value.code == 2


async def test_read_image_gives_text_and_timings(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(b"picture")
    core = FakeCore()
    async with grpc_door(core) as target:
        assert await asyncio.to_thread(client.read_image, target, image, "OCR:") == ("Hello", TIMINGS)
    assert core.requests[0].sampling.temperature == 0


class Controller(control_pb2_grpc.ControlServiceServicer):
    async def ListMembers(self, request: Any, context: Any) -> control_pb2.ListMembersResponse:
        ready, starting = control_pb2.MEMBER_STATE_READY, control_pb2.MEMBER_STATE_STARTING
        return control_pb2.ListMembersResponse(
            members=[
                control_pb2.Member(role="llm", id="llm-1", pid=12, state=ready, in_flight=2, queued=3, group="g", max_model_len=4096),
                control_pb2.Member(role="vision", id="vision-1", pid=13, state=starting, detail="loading weights"),
            ]
        )

    def Join(self, request_iterator: Any, context: Any) -> Any:
        raise AssertionError("not asked")


@pytest.mark.parametrize("as_json", [True, False])
async def test_status_tells_every_member(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    controller = grpc.aio.server()
    control_pb2_grpc.add_ControlServiceServicer_to_server(Controller(), controller)
    port = controller.add_insecure_port("127.0.0.1:0")
    await controller.start()
    assert await status(f"127.0.0.1:{port}", *(["--json"] if as_json else [])) == 0
    await controller.stop(None)
    out = capsys.readouterr().out
    if as_json:
        llm, vision = json.loads(out)["members"]
        assert (llm["role"], llm["id"], llm["pid"], llm["state"], llm["in_flight"], llm["queued"]) == ("llm", "llm-1", 12, "ready", 2, 3)
        assert (llm["group"], llm["rank"], llm["max_model_len"], llm["address"], llm["host"]) == ("g", 0, 4096, "", "")
        assert (vision["state"], vision["detail"]) == ("starting", "loading weights")
    else:
        header, *rows = (line.split() for line in out.splitlines())
        assert header == ["role", "id", "state", "pid", "in", "flight", "queued", "detail"]
        assert rows == [["llm", "llm-1", "ready", "12", "2", "3"], ["vision", "vision-1", "starting", "13", "0", "0", "loading", "weights"]]
