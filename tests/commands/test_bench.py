"""`twinlens bench` against real servers with scripted answers."""

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.commands.bench.command import add_bench_arguments, bench
from services.commands.bench.figures import (
    failure_of,
    is_good,
    itl,
    level_figures,
    path_seconds,
    tokens_of,
    tpot,
    ttft,
)
from services.commands.bench.load import Level, poisson_gaps
from services.commands.bench.pictures import pictures
from services.commands.bench.run import prepare
from services.commands.bench.targets import HttpTarget
from services.commands.bench.workload import Ask, Workload
from services.commands.chat_client import Answer
from tests.commands.scripted_server import (
    STREAM,
    Script,
    event,
    response,
    scripted_server,
    text_event,
)
from tests.gateway.fake_core import TIMINGS, FakeCore, grpc_server, http_server
from tests.loopback import free_port
from tests.policy.sources import ROOT

SMALL = ("--image", "32x16", "--requests", "6", "--max-tokens", "3")
MODELS = [response(200, {"data": [{"id": "m"}]})]
GOOD = [
    STREAM,
    text_event("a"),
    text_event("b", finish_reason="stop"),
    event(choices=[], usage={"completion_tokens": 2, "prompt_tokens": 5}),
]


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser("twinlens bench")
    add_bench_arguments(parser)
    return parser.parse_args(arguments)


async def run(*arguments: str) -> int:
    return await asyncio.to_thread(bench, parse(*arguments))


def result(out: str) -> dict[str, Any]:
    return json.loads(out.splitlines()[-1])


@pytest.fixture
def answers() -> list[Answer]:
    """Two good answers, then one that failed in each way."""
    timed = {"timings": TIMINGS, "status": 200, "began": 10.0}
    return [
        Answer(
            token_times=[(1.0, 1), (3.0, 1)], usage={"completion_tokens": 5}, **timed, seconds=4
        ),
        Answer(token_times=[(2.0, 2), (2.5, 1)], usage={}, seconds=3.0, **timed),
        Answer(status=429, error="full", began=10.0),
        Answer(status=500, error="bug", began=10.0),
        Answer(status=200, error="no llm", began=10.0),
        Answer(status=200, error="late", has_timed_out=True, began=10.0),
        Answer(status=200, error="lost", is_broken=True, began=10.0),
    ]


async def test_a_sweep_over_http_prints_tables_and_one_line_of_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    core = FakeCore()
    async with http_server(core) as port:
        url = f"http://127.0.0.1:{port}/v1"
        status = await run(
            "--url", url, *SMALL, "--concurrency", "1,3", "--out", str(tmp_path), "--slo", "e2e=60"
        )
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    assert "concurrency 1: 6 of 6 requests" in out and "concurrency 3: 6 of 6 requests" in out
    found = result(out)
    assert [level["concurrency"] for level in found["levels"]] == [1, 3]
    assert found.items() >= found["levels"][1].items()
    assert found["model"] == "org/tiny"
    assert (found["succeeded_requests"], found["output_tokens_mean"]) == (6, 3)
    assert found["stage_vision_encode_p99_seconds"] == TIMINGS["images"][0]["encode_seconds"]
    assert found["goodput_share"] == 1
    assert json.loads((tmp_path / "results.json").read_text()) == found
    lines = (tmp_path / "requests.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["output_tokens"] for record in records] == 12 * [3]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    # One request to check, then as many to warm up as are in flight, and those measured.
    assert len(core.requests) == 1 + (1 + 6) + (3 + 6)
    assert all(r.stopping.ignore_eos and r.stopping.min_tokens == 3 for r in core.requests)
    images = {r.images[0] for r in core.requests}
    assert len(images) == len(core.requests)


async def test_a_rate_over_grpc_is_measured_alike(capsys: pytest.CaptureFixture[str]) -> None:
    core = FakeCore()
    async with grpc_server(core) as target:
        assert await run("--grpc", target, *SMALL, "--rate", "1000", "--warmup", "0") == 0
    found = result(capsys.readouterr().out)
    assert (found["rate"], found["succeeded_requests"], found["output_tokens_mean"]) == (1000, 6, 3)
    assert found["stage_decode_mean_seconds"] == TIMINGS["decode_seconds"]
    assert 0 < found["ttft_p50_seconds"] <= found["e2e_p99_seconds"]
    assert found["send_lag_p99_seconds"] >= 0
    assert len(core.requests) == 1 + 6
    assert core.requests[0].stopping.ignore_eos


async def test_a_server_that_refuses_a_fixed_length_is_asked_without(
    capsys: pytest.CaptureFixture[str],
) -> None:
    refusal = [response(400, {"error": {"message": "unknown field ignore_eos"}})]
    script = Script(MODELS, refusal, GOOD)
    async with scripted_server(script) as url:
        assert await run("--url", url, *SMALL, "--images", "0") == 0
    out, err = capsys.readouterr()
    assert "refuses ignore_eos" in err
    assert result(out)["has_fixed_length"] is False
    assert "ignore_eos" in script.bodies[1]
    assert all("ignore_eos" not in body for body in script.bodies[2:])


@pytest.mark.parametrize(
    ("responses", "said"),
    [
        ([MODELS, [response(500, b"broken")]], "fails the first request: broken"),
        ([[response(404, b"")]], "answers with status 404"),
        ([MODELS, GOOD, GOOD, [response(500, b"bug")]], "all 6 requests failed: bug"),
    ],
)
async def test_a_server_that_fails_is_one_clear_line(
    responses: list[list[bytes]], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with scripted_server(Script(*responses)) as url:
        assert await run("--url", url, *SMALL) == 1
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


async def test_a_server_that_is_not_there_and_a_wrong_model_are_one_clear_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    assert await run("--url", f"http://{nowhere}/v1") == 1
    assert await run("--grpc", nowhere) == 1
    async with http_server(FakeCore()) as port:
        assert await run("--url", f"http://127.0.0.1:{port}/v1", "--model", "other") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "nothing answers at http" in lines[0] and "nothing answers at 127" in lines[1]
    assert "no model 'other'; it serves org/tiny" in lines[2]


async def test_a_refused_client_waits_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    busy = [response(429, {"error": {"message": "full"}}, "retry-after-ms: 1")]
    async with scripted_server(Script(MODELS, GOOD, GOOD, busy, busy, GOOD)) as url:
        assert await run("--url", url, *SMALL) == 0
    out, _ = capsys.readouterr()
    assert "refused with status 429: 2" in out
    found = result(out)
    assert (found["succeeded_requests"], found["rejected_requests"]) == (4, 2)
    assert found["failed_requests"] == 0


async def test_a_last_request_that_is_refused_ends_the_level(
    capsys: pytest.CaptureFixture[str],
) -> None:
    busy = [response(429, b"full", "retry-after: 100000")]
    async with scripted_server(Script(MODELS, GOOD, busy)) as url:
        flags = ("--requests", "1", "--warmup", "0", "--images", "0")
        assert await run("--url", url, *flags) == 1
    assert result(capsys.readouterr().out)["rejected_requests"] == 1


async def test_results_are_printed_even_if_their_files_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").mkdir()
    async with scripted_server(Script(MODELS, GOOD)) as url:
        assert await run("--url", url, *SMALL, "--out", str(tmp_path)) == 1
    out, err = capsys.readouterr()
    assert result(out)["succeeded_requests"] == 6
    assert err == f"twinlens: cannot write {tmp_path}: is a directory\n"


async def test_ctrl_c_ends_the_drawing_of_images() -> None:
    drawn = 0

    def asks() -> Iterator[Ask]:
        nonlocal drawn
        for drawn in count(1):
            if drawn == 3:
                task.cancel()
            yield Ask("", [], 1)

    target = HttpTarget("http://127.0.0.1:1/v1", "m", 1.0)
    task = asyncio.create_task(prepare(target, asks(), 10**9))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert drawn == 3


async def test_ctrl_c_prints_what_was_measured() -> None:
    """The server answers the check, the warm-up and two requests, and not the next one."""
    asked = asyncio.Event()

    class Hanging(Script):
        async def serve(self, reader: Any, writer: Any) -> None:
            if len(self.heads) == 5:
                asked.set()
                await reader.read(-1)
                writer.close()
            else:
                await super().serve(reader, writer)

    async with scripted_server(Hanging(MODELS, GOOD)) as url:
        command = [sys.executable, "-m", "services.cli", "bench", "--url", url, *SMALL]
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, stdout=-1, stderr=-1, env=dict(os.environ)
        )
        await asked.wait()
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert (process.returncode, err) == (130, b"")
    assert b"2 of 2 requests" in out
    assert result(out.decode())["is_interrupted"] is True


def test_the_times_of_an_answer(answers: list[Answer]) -> None:
    assert ttft(answers[0]) == 1.0
    assert tpot(answers[0]) == (3.0 - 1.0) / (5 - 1)
    assert tokens_of(answers[1]) == 3  # without usage, those of the chunks
    assert itl(answers[1]) == [0.5]
    assert tpot(Answer(token_times=[(1.0, 1)])) is None
    # The last three tokens have no text, such as the one that ends the answer.
    answers[0].finish_seconds = 9.0
    assert tpot(answers[0]) == (9.0 - 1.0) / (5 - 1)
    assert ttft(Answer()) is None


def test_the_vision_time_is_taken_out_of_the_language_groups(answers: list[Answer]) -> None:
    assert path_seconds(answers[0]) == {
        "preprocess": 0.25,
        "vision": 0.5,
        "prefill": 0.0,
        "decode": 1.0,
    }
    assert path_seconds(Answer()) == {}


def test_the_figures_of_a_level(answers: list[Answer]) -> None:
    level = Level(4, 0.0, answers=answers, began=9.0)
    found = level_figures(level, 2, {"ttft": 1.5})
    assert found["requests"] == 7
    assert (found["succeeded_requests"], found["rejected_requests"]) == (2, 1)
    assert found["failed_requests"] == 4
    assert found["failures"] == {
        "status 500": 1,
        "error in the stream": 1,
        "timeout": 1,
        "connection": 1,
    }
    assert found["duration_seconds"] == 5.0
    assert found["requests_per_second"] == 2 / 5
    assert found["images_per_second"] == 2 * 2 / 5
    assert found["output_tokens_per_second"] == (5 + 3) / 5
    assert "prompt_tokens_mean" not in found, "the server does not say it"
    assert found["ttft_mean_seconds"] == 1.5
    assert found["ttft_p90_seconds"] == pytest.approx(1.9)
    assert found["e2e_p50_seconds"] == 3.5
    assert found["goodput_share"] == 1 / 7
    assert found["goodput_requests_per_second"] == 1 / 5


def test_goodput_counts_what_is_within_every_limit(answers: list[Answer]) -> None:
    assert is_good(answers[0], {"ttft": 1.0, "tpot": 0.5, "e2e": 4.0})
    assert not is_good(answers[0], {"tpot": 0.4})
    assert not is_good(answers[2], {})
    assert failure_of(answers[0]) == ""


def workload(**changes: Any) -> Workload:
    values = {"width": 40, "height": 24, "kind": "png", "images_per_request": 2, "same_share": 0.0}
    return Workload(**values | {"prompt_words": 5, "max_tokens": 1, "seed": 3} | changes)


def test_requests_are_different_and_the_same_again_with_the_same_seed() -> None:
    asks = list(islice(workload().requests(), 20))
    assert len({image for ask in asks for image in ask.images}) == 40
    assert all(len(ask.text.split()) == 5 for ask in asks)
    assert list(islice(workload().requests(), 20)) == asks
    assert next(workload(seed=4).requests()) != asks[0]


def test_a_share_of_the_images_repeats() -> None:
    asks = islice(workload(same_share=0.5, images_per_request=1).requests(), 400)
    assert 160 < len({ask.images[0] for ask in asks}) < 240


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8\xff")])
def test_images_have_the_wanted_kind(kind: str, start: bytes) -> None:
    assert next(pictures(np.random.default_rng(0), 33, 17, kind)).startswith(start)


def test_arrivals_have_the_mean_rate_and_are_the_same_with_the_same_seed() -> None:
    gaps = list(islice(poisson_gaps(50.0, 1), 5000))
    assert np.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert np.std(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert list(islice(poisson_gaps(50.0, 1), 5000)) == gaps


@pytest.mark.parametrize(
    "wrong",
    [
        "--concurrency 0",
        "--concurrency 1,x",
        "--concurrency 1 --rate 2",
        "--rate 0",
        "--image 0x4",
        "--image 4",
        "--same 1.5",
        "--same -1",
        "--same nan",
        "--same .",
        "--slo x=1",
        "--slo ttft",
        "--timeout inf",
    ],
)
def test_wrong_values_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*wrong.split())
    assert "error: argument" in capsys.readouterr().err


def test_values_are_read() -> None:
    found = parse("--slo", "ttft=2,e2e=0.5", "--same", "0", "--concurrency", "2,4")
    assert (found.slo, found.same, found.concurrency) == ({"ttft": 2.0, "e2e": 0.5}, 0.0, [2, 4])
