"""The OpenAPI document describes every route, and follows the models of bodies."""

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from services.gateway.openapi import MORE, ApiRoute
from services.gateway.schema import ChatRequest
from tests.gateway.fake_core import FakeCore

APP = create_app(MeasuredCore(FakeCore()))


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = TestClient(APP).get("/openapi.json").json()
    return found


def references_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from [value["$ref"]] if "$ref" in value else []
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from references_in(each)


def test_every_route_is_described(document: dict[str, Any]) -> None:
    described = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
    }
    served = set()
    for route in APP.routes:
        assert isinstance(route, ApiRoute), f"make {route} an ApiRoute, with a summary"
        served |= {(method, route.documented_path) for method in route.documented_methods}
        is_stored = route.path.startswith("/v1/responses/")
        assert route.body or is_stored or "POST" not in (route.methods or ()), (
            f"{route.path} takes a body: name its model"
        )
    assert described == served


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    references = set(references_in(document))
    assert references == {f"#/components/schemas/{name}" for name in schemas}


def test_the_fields_are_those_of_the_models(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    chat = schemas["ChatRequest"]["properties"]
    assert chat.keys() == ChatRequest.model_fields.keys()
    number, nothing = chat["temperature"]["anyOf"]
    assert (number["minimum"], number["maximum"], nothing["type"]) == (0, 100, "null")
    for name, fields in MORE.items():
        assert fields.keys() <= schemas[name]["properties"].keys(), f"{name} has lost a field"
