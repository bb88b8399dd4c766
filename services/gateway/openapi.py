"""The OpenAPI document of the HTTP API, made from the table of routes and the models of bodies."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from common.chat import ROLES
from common.messages import Sampling, Stopping
from services.gateway.pooling_schema import ENCODING_FORMATS
from services.gateway.schema import SAMPLING_FIELDS, STOPPING_FIELDS

Schema = dict[str, Any]

SCHEMAS = "#/components/schemas/"
ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
                "stage": {"type": "string", "description": "The stage that failed."},
                "image": {"type": "integer", "description": "The index of the wrong image."},
            },
        }
    },
}
"""OpenAI's error object, with what it has more here."""
PART: Schema = {
    "type": "object",
    "required": ["type"],
    "oneOf": [
        {
            "required": ["text"],
            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        },
        {
            "required": ["image_url"],
            "properties": {
                "type": {"const": "image_url"},
                "image_url": {
                    "type": "object",
                    "required": ["url"],
                    "properties": {"url": {"type": "string", "description": "A data URI."}},
                },
            },
        },
    ],
}
WIDER = {"seed", "stop"}
"""Values of which HTTP accepts more than the wire does."""
MORE: dict[str, dict[str, Schema]] = {
    "ChatMessage": {
        "role": {"type": "string", "enum": list(ROLES)},
        "content": {"oneOf": [{"type": ["string", "null"]}, {"type": "array", "items": PART}]},
    },
    "EmbeddingsRequest": {
        "input": {
            "oneOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1},
                    "minItems": 1,
                },
            ]
        },
        "encoding_format": {"enum": [*ENCODING_FORMATS, None]},
    },
}
"""What the models of bodies leave to code, by model and field."""
REQUEST_ID: Schema = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "The request's id, for logs and traces. The answer repeats it.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,128}$"},
}
DESCRIPTION = """Vision-language models over OpenAI's API.

Any request may have the header `X-Request-Timeout`: the seconds until its deadline, up to 1e9.
"""


class ApiRoute(Route):
    """A route, and what the document says of it."""

    def __init__(
        self,
        path: str,
        endpoint: Any,
        summary: str,
        *,
        methods: Sequence[str] = (),
        body: type[BaseModel] | None = None,
        media_types: Sequence[str] = ("application/json",),
    ) -> None:
        """`body` is the model of the request's body, and `media_types` are those of answers.

        Without `methods`, a route with a body is for POST, and another one for GET.
        """
        super().__init__(path, endpoint, methods=methods or ("POST" if body else "GET",))
        self.summary = summary
        self.body = body
        self.media_types = media_types

    @property
    def documented_path(self) -> str:
        """The path as OpenAPI writes it."""
        return re.sub(r"{(\w+):\w+}", r"{\1}", self.path)

    @property
    def documented_methods(self) -> list[str]:
        return sorted((self.methods or set()) - {"HEAD"})


def document(routes: Sequence[ApiRoute], version: str) -> Schema:
    """Return the OpenAPI document of these routes."""
    models = sorted({route.body for route in routes if route.body}, key=lambda m: m.__qualname__)
    references, made = models_json_schema(
        [(model, "validation") for model in models], ref_template=SCHEMAS + "{model}"
    )
    bodies = {model: references[model, "validation"] for model in models}
    paths: dict[str, Schema] = {}
    for route in routes:
        operations = paths.setdefault(route.documented_path, {})
        for method in route.documented_methods:
            operations[method.lower()] = operation(route, bodies)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Twinlens", "version": version, "description": DESCRIPTION},
        "paths": paths,
        "components": {"schemas": complete(made["$defs"]) | {"Error": ERROR}},
    }


def operation(route: ApiRoute, bodies: Mapping[type[BaseModel], Schema]) -> Schema:
    """Return what one method of a route does. `bodies` has references to their schemas."""
    described: Schema = {
        "summary": route.summary,
        "parameters": [*path_parameters(route), REQUEST_ID],
        "responses": {
            "200": {
                "description": "The answer.",
                "content": {media_type: {} for media_type in route.media_types},
            },
            "default": {
                "description": "A refusal or a failure.",
                "content": content({"$ref": SCHEMAS + "Error"}),
            },
        },
    }
    if route.body:
        described["requestBody"] = {"required": True, "content": content(bodies[route.body])}
    return described


def path_parameters(route: ApiRoute) -> list[Schema]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in route.param_convertors
    ]


def content(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def complete(schemas: dict[str, Schema]) -> dict[str, Schema]:
    """Return the schemas of models, with what the models leave to code."""
    ranges = ranges_of_values()
    for name, schema in schemas.items():
        fields = schema.get("properties", {})
        wanted = (ranges if name.endswith("Request") else {}) | MORE.get(name, {})
        fields.update({field: wanted[field] for field in wanted.keys() & fields.keys()})
    return schemas


def ranges_of_values() -> dict[str, Schema]:
    """Return the schemas of sampling and stopping values, whose ranges the wire checks."""
    ranges: dict[str, Schema] = {}
    for kind, names in ((Sampling, SAMPLING_FIELDS), (Stopping, STOPPING_FIELDS)):
        fields = msgspec.json.schema(kind)["$defs"][kind.__name__]["properties"]
        for name in names & fields.keys() - WIDER:
            schema = {key: value for key, value in fields[name].items() if key != "default"}
            ranges[name] = schema if "anyOf" in schema else {"anyOf": [schema, {"type": "null"}]}
    return ranges
