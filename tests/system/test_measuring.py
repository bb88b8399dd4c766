"""The commands that measure and watch, on a running system."""

import json
from typing import Any

import pytest

from services.commands.bench.command import bench
from services.commands.top import top
from tests.commands.test_bench import parse as parse_bench
from tests.commands.test_top import arguments as parse_top
from tests.system.running import Running

pytestmark = pytest.mark.system


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    small = ("--concurrency", "2", "--requests", "4", "--max-tokens", "8", "--image", "56x56")
    assert bench(parse_bench(*small, *arguments)) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_both_apis_are_measured_alike(
    embedded: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    over_http = measured(capsys, "--url", embedded.url("/v1"))
    over_grpc = measured(capsys, "--grpc", f"127.0.0.1:{embedded.grpc_port}")
    for found in (over_http, over_grpc):
        assert (found["succeeded_requests"], found["output_tokens_mean"]) == (4, 8)
        assert found["has_fixed_length"]
        assert found["stage_prefill_p50_seconds"] <= found["ttft_p99_seconds"]
        assert found["ttft_p50_seconds"] <= found["e2e_p99_seconds"]
    assert over_http["stage_vision_encode_mean_seconds"] > 0


def test_top_shows_every_stage(embedded: Running, capsys: pytest.CaptureFixture[str]) -> None:
    grpc = ("--grpc", f"127.0.0.1:{embedded.grpc_port}")
    assert top(parse_top(*grpc, "--url", embedded.url("/v1"), "--interval", "0.01")) == 0
    shown = capsys.readouterr().out
    assert "0.0 requests/s" in shown
    assert all(member.id in shown for member in embedded.members())
    assert max(map(len, shown.splitlines())) <= 80
