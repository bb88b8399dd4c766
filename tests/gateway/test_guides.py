"""What an answer must follow is read from any of its fields, and only one of them may say it."""

import json
from typing import Any

import pytest

from proto.twinlens.inference.v1 import inference_pb2
from services.gateway.grpc_messages import read_guide
from services.gateway.guides import Guide
from services.gateway.invalid_field import InvalidField
from tests.gateway.test_schema import generation, refusal

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TEXT = json.dumps(SCHEMA)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, ("json_object", "")),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, ("json_schema", TEXT)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "n",
                        "description": "d",
                        "strict": True,
                        "schema": SCHEMA,
                    },
                }
            },
            ("json_schema", TEXT),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, ("json_schema", TEXT)),
        ({"structured_outputs": {"json": TEXT}}, ("json_schema", TEXT)),
        ({"structured_outputs": {"json_object": True}}, ("json_object", "")),
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, ("choice", '["a", "b"]')),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, ("grammar", 'root ::= "a"')),
        ({"guided_json": SCHEMA}, ("json_schema", TEXT)),
        ({"guided_json": TEXT, "response_format": {"type": "text"}}, ("json_schema", TEXT)),
        ({"guided_regex": "a+"}, ("regex", "a+")),
        ({"guided_choice": ["a"]}, ("choice", '["a"]')),
        ({"guided_grammar": "start: /a/"}, ("grammar", "start: /a/")),
        ({"json_schema": TEXT}, ("json_schema", TEXT)),
        ({"regex": "a"}, ("regex", "a")),
        ({"ebnf": 'root ::= "a"'}, ("grammar", 'root ::= "a"')),
        ({"grammar": 'root ::= "a"'}, ("grammar", 'root ::= "a"')),
    ],
)
def test_each_field_makes_its_guide(fields: dict[str, Any], expected: tuple[str, str]) -> None:
    asked = generation(**fields)
    assert (asked.guide_kind, asked.guide) == expected
    assert asked.guide_whitespace == ""


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"regex": "a", "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "zoom": 1}}, "structured_outputs.zoom"),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "structured_outputs.structural_tag",
        ),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"grammar": {"type": "regex", "value": "a"}}, "grammar"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"guided_json": {}, "guided_whitespace_pattern": "a" * 257}, "guided_whitespace_pattern"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"response_format": {"type": "text", "schema": SCHEMA}}, "response_format.schema"),
        ({"response_format": {"type": "json_object", "zoom": 1}}, "response_format.zoom"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": SCHEMA, "zoom": 1},
                }
            },
            "response_format.json_schema.zoom",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_its_path(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param


def test_white_space_is_passed_on_for_json_alone() -> None:
    for fields in (
        {"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"},
        {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?"}},
        {"response_format": {"type": "json_object"}, "guided_whitespace_pattern": " ?"},
    ):
        assert generation(**fields).guide_whitespace == " ?"


def test_objects_are_closed_on_request_but_for_what_only_looks_like_one() -> None:
    schema = {
        "properties": {"properties": {"type": "string"}},
        "items": {"properties": {}, "additionalProperties": True},
        "enum": [{"properties": 1}],
    }
    outputs = {"json": schema, "disable_additional_properties": True}
    asked = generation(structured_outputs=outputs)
    assert json.loads(asked.guide) == schema | {"additionalProperties": False}


def test_grpc_reads_the_same_guides() -> None:
    params = inference_pb2.GuideParams
    choices = inference_pb2.Choices(texts=["a", "b"])
    assert read_guide(params()) == Guide()
    assert read_guide(params(choice=choices)) == Guide("choice", '["a", "b"]')
    assert read_guide(params(grammar="start: /a/")) == Guide("grammar", "start: /a/")
    spaced = read_guide(params(json_object=True, whitespace_pattern=" ?"))
    assert spaced == Guide("json_object", "", " ?")
    for wrong in (
        params(choice=inference_pb2.Choices()),
        params(regex="a", whitespace_pattern=" "),
    ):
        with pytest.raises(InvalidField, match=r"^guide"):
            read_guide(wrong)
