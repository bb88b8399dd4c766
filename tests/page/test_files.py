"""The files of the page, as a client gets them."""

import tomllib
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from starlette.testclient import TestClient

import services.gateway.ui
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from services.gateway.ui.endpoints import Ui
from services.gateway.ui.files import FILES
from tests.gateway.fake_core import FakeCore
from tests.policy.sources import ROOT

STATIC = files(services.gateway.ui) / "static"
MAX_BYTES = 40_000


@pytest.fixture
def client() -> Iterator[TestClient]:
    nothing: Any = None
    app = create_app(MeasuredCore(FakeCore()), ui=Ui(nothing, nothing))
    with TestClient(app, follow_redirects=False) as client:
        yield client


def test_the_files_are_part_of_a_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"]["package-data"]["services.gateway.ui"] == ["static/*"]


def test_every_file_is_served_and_they_are_small() -> None:
    assert {file.name for file in STATIC.iterdir()} == FILES.keys()
    assert sum(len(file.read_bytes()) for file in STATIC.iterdir()) < MAX_BYTES


@pytest.mark.parametrize("name", FILES)
def test_a_file_comes_with_its_type_and_may_do_nothing_but_what_the_page_needs(
    client: TestClient, name: str
) -> None:
    answer = client.get("/ui" if name == "index.html" else f"/ui/{name}")
    assert (answer.status_code, answer.content) == (200, (STATIC / name).read_bytes())
    headers = answer.headers
    assert headers["content-type"] == FILES[name]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    policy = headers["content-security-policy"].split("; ")
    assert {
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'none'",
    } <= set(policy)
    assert "unsafe" not in headers["content-security-policy"]


def test_a_file_that_the_browser_has_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/ui")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/ui", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = client.get("/ui", headers={"if-none-match": '"other"'})
    assert other.status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/ui/index.html",
        "/ui/files.py",
        "/ui/../ui/files.py",
        "/ui/%2e%2e/files.py",
        "/ui/static/page.js",
        "/ui//etc/passwd",
        "/ui/..%2f..%2fmetrics.py",
    ],
)
def test_no_other_path_leads_to_a_file(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_a_slash_too_many_leads_to_the_page(client: TestClient) -> None:
    answer = client.get("/ui/")
    assert (answer.status_code, answer.headers["location"]) == (308, "../ui")


def test_without_the_page_there_is_nothing_under_ui() -> None:
    with TestClient(create_app(MeasuredCore(FakeCore()))) as client:
        for path in ("/ui", "/ui/page.js", "/ui/events"):
            assert client.get(path).status_code == 404
