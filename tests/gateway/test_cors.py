"""Which web pages may use the API, what a refusal tells them, and what a path may look like."""

import asyncio
from typing import Any

import pytest
from starlette.testclient import TestClient

from common.errors import Exhausted
from common.setting_checks import objection_to_origins
from services.gateway.cors import Cors
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from tests.gateway.fake_core import FakeCore, http_server
from tests.security.test_http_door import connect, send

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
LOCAL = "http://localhost:3000"
LISTED = "https://app.example, chrome-extension://abc,http://lan.example:80"


def client(origins: str = "", core: FakeCore | None = None) -> TestClient:
    return TestClient(create_app(MeasuredCore(core or FakeCore()), 10_000, cors=Cors(origins)))


def preflight(client: TestClient, origin: str, path: str = CHAT, **more: str) -> Any:
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    } | {name.replace("_", "-"): value for name, value in more.items()}
    return client.options(path, headers=headers)


@pytest.mark.parametrize(
    ("origins", "origin", "is_allowed"),
    [
        ("", LOCAL, True),
        ("", "https://localhost", True),
        ("", "http://127.0.0.1:8080", True),
        ("", "https://[::1]:1", True),
        ("", "https://app.example", False),
        ("", "null", False),
        ("", "http://localhost.evil.example", False),
        ("", "http://127.0.0.1.evil.example", False),
        ("", "http://localhost:80x", False),
        ("", "ftp://localhost", False),
        ("", "http://localhost@evil.example", False),
        (LISTED, "https://app.example", True),
        (LISTED, "http://app.example", False),
        (LISTED, "https://app.example:444", False),
        (LISTED, "https://sub.app.example", False),
        (LISTED, "chrome-extension://abc", True),
        (LISTED, "http://lan.example", True),
        (LISTED, LOCAL, True),
        (LISTED, "null", False),
        ("*", "https://anything.example", True),
        ("*", "null", True),
    ],
)
def test_pages_of_these_origins_are_let_in(origins: str, origin: str, is_allowed: bool) -> None:
    page = client(origins)
    asked = preflight(page, origin)
    answered = page.post(CHAT, json=ASK, headers={"origin": origin})
    assert answered.status_code == 200, "the origin is the browser's matter"
    for answer in (asked, answered):
        headers = answer.headers
        if is_allowed:
            assert headers["access-control-allow-origin"] == origin and headers["vary"] == "Origin"
        else:
            assert not any(name.startswith("access-control") for name in headers)
    assert asked.status_code == (204 if is_allowed else 405)


def test_a_preflight_says_what_a_page_may_send() -> None:
    headers = preflight(client(), LOCAL).headers
    assert headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-lang"
    assert "POST" in headers["access-control-allow-methods"] and headers["access-control-max-age"]
    assert "access-control-allow-private-network" not in headers
    private = preflight(client(), LOCAL, access_control_request_private_network="true")
    assert private.headers["access-control-allow-private-network"] == "true"
    odd = preflight(client(), LOCAL, access_control_request_headers="<" + "a" * 2000)
    assert len(odd.headers["access-control-allow-headers"]) < 200
    for path in ("/v1/models/", "/livez", "/nothing"):
        assert preflight(client(), LOCAL, path).status_code == 204


def test_a_page_can_read_every_refusal() -> None:
    page = client()
    full = client(core=FakeCore(refusal=Exhausted("full", retry_after=2)))
    broken = client(core=FakeCore(refusal=RuntimeError("a bug")))
    for answer, status in [
        (page.get("/nothing", headers={"origin": LOCAL}), 404),
        (page.get(CHAT, headers={"origin": LOCAL}), 405),
        (page.post(CHAT, content=b"{", headers={"origin": LOCAL}), 400),
        (page.post(CHAT, content=b"x" * 10_001, headers={"origin": LOCAL}), 413),
        (page.post(CHAT, data={"a": "b"}, headers={"origin": LOCAL}), 415),
        (full.post(CHAT, json=ASK, headers={"origin": LOCAL}), 429),
        (broken.post(CHAT, json=ASK, headers={"origin": LOCAL}), 500),
    ]:
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == LOCAL
        assert "retry-after" in answer.headers["access-control-expose-headers"]


async def test_a_page_can_read_what_the_connection_refuses() -> None:
    long = b"GET / HTTP/1.1\r\nOrigin: http://localhost:3000\r\nX-Request-Id: mine\r\n"
    async with http_server(FakeCore()) as port, asyncio.timeout(10):
        answer = await send(await connect(port), long + b"x: y\r\n" * 20_000)
        assert answer.startswith(b"HTTP/1.1 431")
        assert b"access-control-allow-origin: http://localhost:3000\r\n" in answer
        assert b"x-request-id: mine\r\n" in answer


@pytest.mark.parametrize(
    ("origins", "is_good"),
    [
        ("", True),
        ("*", True),
        (LISTED, True),
        ("https://a.example/", True),
        ("a.example", False),
        ("https://a.example/page", False),
        ("https://*.example", False),
        ("https://a.example,", False),
        ("null", False),
    ],
)
def test_what_is_not_an_origin_is_refused_at_the_start(origins: str, is_good: bool) -> None:
    assert (objection_to_origins(origins) == "") is is_good


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/org/tiny", "/livez", "/version"])
def test_a_slash_at_the_end_of_a_path_changes_nothing(path: str) -> None:
    page = client()
    assert page.get(path + "/").json().keys() == page.get(path).json().keys()
    assert page.get(path + "/").status_code == 200


def test_a_slash_at_the_end_of_a_posts_path_changes_nothing() -> None:
    assert client().post(CHAT + "/", json=ASK).json()["choices"]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/v1/chat/completions/x", "//", "/ui"])
def test_an_unknown_path_names_those_that_exist(method: str, path: str) -> None:
    answer = client().request(method, path)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert f"POST {CHAT};" in error["message"] and "GET /v1/models/{model}" in error["message"]
    assert error["code"] == "not_found" and error["type"] == "invalid_request_error"


def test_a_wrong_method_names_the_right_one() -> None:
    for method, path, right in [("GET", CHAT, "POST"), ("PUT", "/v1/models/", "GET")]:
        answer = client().request(method, path)
        assert answer.status_code == 405 and right in answer.headers["allow"]
        assert f"use {right}" in answer.json()["error"]["message"]
