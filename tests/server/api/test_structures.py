import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from headlong.server.api.schemas_structures import MAX_CHOICES, StructureFields
from headlong.server.api.structures import choice_structure, structure_of
from headlong.server.engine.sampling_params import MAX_STRUCTURE_CHARS, Structure
from headlong.server.errors import InvalidRequestError

SCHEMA = {"type": "object", "properties": {"é": {"type": "integer"}}}
SCHEMA_TEXT = '{"type":"object","properties":{"é":{"type":"integer"}}}'


def read(**fields: object) -> Structure | None:
    return structure_of(StructureFields.model_validate(fields))


def json_schema(**fields: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, **fields}}


@pytest.mark.parametrize(
    ("fields", "structure", "param"),
    [
        ({"response_format": {"type": "json_object"}}, ("json_object", ""), "response_format"),
        ({"response_format": json_schema()}, ("json_schema", SCHEMA_TEXT), "response_format"),
        (
            {"response_format": json_schema(strict=False, description="d")},
            ("json_schema", SCHEMA_TEXT),
            "response_format",
        ),
        ({"regex": "a+"}, ("regex", "a+"), "regex"),
        ({"grammar": 'start: "a"'}, ("grammar", 'start: "a"'), "grammar"),
        (
            {"structured_outputs": {"json": SCHEMA}},
            ("json_schema", SCHEMA_TEXT),
            "structured_outputs.json",
        ),
        (
            {"structured_outputs": {"json": json.dumps(SCHEMA)}},
            ("json_schema", json.dumps(SCHEMA)),
            "structured_outputs.json",
        ),
        (
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": False}},
            ("json_object", ""),
            "structured_outputs.json_object",
        ),
        ({"structured_outputs": {"regex": "a|b"}}, ("regex", "a|b"), "structured_outputs.regex"),
        (
            {"structured_outputs": {"choice": ["a", "a.b", "a"]}},
            ("regex", r"a|a\.b"),
            "structured_outputs.choice",
        ),
        (
            {"structured_outputs": {"grammar": "root ::= [a]"}},
            ("grammar", "root ::= [a]"),
            "structured_outputs.grammar",
        ),
    ],
)
def test_each_field_gives_its_structure(
    fields: dict[str, object], structure: tuple[str, str], param: str
) -> None:
    found = read(**fields)
    assert found is not None
    assert (found.kind, found.text) == structure
    assert found.param == param


@pytest.mark.parametrize(
    "fields",
    [{}, {"response_format": None}, {"response_format": {"type": "text"}}, {"regex": None}],
)
def test_any_text_will_do_without_them(fields: dict[str, object]) -> None:
    assert read(**fields) is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"regex": "a", "response_format": {"type": "json_object"}},
            ["response_format", "regex"],
        ),
        ({"regex": "a", "grammar": "b"}, ["regex", "grammar"]),
        (
            {"structured_outputs": {"json": SCHEMA, "choice": ["a"]}},
            ["structured_outputs.json", "structured_outputs.choice"],
        ),
        (
            {"grammar": "x", "structured_outputs": {"regex": "a"}},
            ["grammar", "structured_outputs.regex"],
        ),
        ({"structured_outputs": {}}, ["structured_outputs"]),
        ({"structured_outputs": {"json_object": False}}, ["structured_outputs"]),
        (
            {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " "}},
            ["structured_outputs.whitespace_pattern"],
        ),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            ["structured_outputs.structural_tag"],
        ),
        (
            {"structured_outputs": {"choice": ["x" * 100] * 2 + ["y" * MAX_STRUCTURE_CHARS]}},
            ["structured_outputs.choice"],
        ),
        (
            {"structured_outputs": {"json": {"const": "x" * MAX_STRUCTURE_CHARS}}},
            ["structured_outputs.json"],
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, object], named: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read(**fields)
    assert caught.value.param == named[-1]
    assert all(name in caught.value.message for name in named)


@pytest.mark.parametrize(
    ("fields", "location"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": json_schema(schema=True)}, "schema"),
        ({"response_format": json_schema(name="")}, "name"),
        ({"regex": ""}, "regex"),
        ({"regex": "x" * (MAX_STRUCTURE_CHARS + 1)}, "regex"),
        ({"structured_outputs": {"choice": []}}, "choice"),
        ({"structured_outputs": {"choice": [""]}}, "choice"),
        ({"structured_outputs": {"choice": ["a"] * (MAX_CHOICES + 1)}}, "choice"),
        ({"structured_outputs": {"json": 3}}, "json"),
    ],
)
def test_malformed_fields_are_refused_by_name(fields: dict[str, object], location: str) -> None:
    with pytest.raises(ValidationError) as caught:
        StructureFields.model_validate(fields)
    assert location in caught.value.errors()[0]["loc"]


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4), st.text())
def test_choices_match_themselves_alone(choices: list[str], other: str) -> None:
    pattern = re.compile(choice_structure(choices, "choice").text)
    assert all(pattern.fullmatch(choice) for choice in choices)
    assert (pattern.fullmatch(other) is not None) == (other in choices)
