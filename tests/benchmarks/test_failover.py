"""The stand-ins behind another system's proxy, and what the failover benchmark says without one."""

import argparse
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks import failover, stand_in
from benchmarks.proxied import CannotRun, Proxied
from services.commands.bench.targets import HttpTarget
from services.commands.bench.workload import Ask
from services.commands.chat_client import image_part


@pytest.fixture
async def language_model() -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", stand_in.LanguageModel().chat)
    app.router.add_get("/v1/models", stand_in.models)
    async with TestServer(app) as server:
        yield str(server.make_url("/v1"))


async def test_the_stand_in_streams_what_the_load_test_asks_for(language_model: str) -> None:
    async with HttpTarget(language_model, "", 10.0) as target:
        answer = await target.send(target.prepare(Ask("hi", [], 3)))
    assert (answer.text, answer.finish_reason, answer.error) == ("word word word ", "length", "")
    assert answer.usage == {"completion_tokens": 3}


def test_an_encoder_counts_the_images_of_a_request() -> None:
    images = 2 * [image_part(b"\xff\xd8\xff")]
    content = [*images, {"type": "text", "text": "hi"}]
    assert stand_in.num_images({"messages": [{"content": "hi"}, {"content": content}]}) == 2


def test_without_a_proxy_its_part_is_skipped() -> None:
    found = failover.proxied(argparse.Namespace(proxy=None), is_dynamic=False)
    assert "--proxy" in found["skipped"]


def test_a_proxy_that_does_not_start_says_why(tmp_path: Path) -> None:
    proxy = tmp_path / "proxy.py"
    proxy.write_text("raise SystemExit('needs uvloop')", encoding="utf-8")
    starting = Proxied(proxy, sys.executable, 1, 0.0, is_dynamic=False)
    with pytest.raises(CannotRun, match="needs uvloop"), starting:
        pass
