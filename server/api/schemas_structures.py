"""The request fields that give a completion its form."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, JsonValue, StrictBool, StrictStr, Tag

from headlong.server.api.schemas_common import RequestModel
from headlong.server.engine.sampling_params import MAX_STRUCTURE_CHARS

MAX_CHOICES = 1024

JSONSchema = dict[str, JsonValue]
StructureText = Annotated[StrictStr, Field(min_length=1, max_length=MAX_STRUCTURE_CHARS)]


class TextFormat(RequestModel):
    """Any text."""

    type: Literal["text"]


class JSONObjectFormat(RequestModel):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(RequestModel):
    """A JSON Schema with a name.

    Attributes:
        name: For people; changes nothing.
        description: For people; changes nothing.
        schema_: What the answer must validate against.
        strict: The answer keeps to the schema whatever this says.
    """

    name: Annotated[StrictStr, Field(min_length=1, max_length=64)]
    description: StrictStr | None = None
    schema_: JSONSchema = Field(alias="schema")
    strict: StrictBool | None = None


class JSONSchemaFormat(RequestModel):
    """JSON that validates against a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


def _format_kind(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"({kind})" if kind in ("text", "json_object", "json_schema") else None


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("(text)")]
    | Annotated[JSONObjectFormat, Tag("(json_object)")]
    | Annotated[JSONSchemaFormat, Tag("(json_schema)")],
    Discriminator(
        _format_kind,
        custom_error_type="response_format",
        custom_error_message="type must be 'text', 'json_object' or 'json_schema'",
    ),
]


def _schema_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "(text)"
    return "(object)" if isinstance(value, dict) else None


SchemaOrText = Annotated[
    Annotated[StructureText, Tag("(text)")] | Annotated[JSONSchema, Tag("(object)")],
    Discriminator(
        _schema_kind,
        custom_error_type="schema_form",
        custom_error_message="must be a JSON Schema, as an object or as text",
    ),
]


class StructuredOutputs(RequestModel):
    """vLLM's way to say the form of a completion: one of these.

    Attributes:
        json_: A JSON Schema.
        json_object: True for any JSON object.
        regex: The whole text matches it.
        choice: The text is one of these.
        grammar: Lark or GBNF.
    """

    json_: SchemaOrText | None = Field(None, alias="json")
    json_object: StrictBool | None = None
    regex: StructureText | None = None
    choice: (
        Annotated[
            list[Annotated[StrictStr, Field(min_length=1)]],
            Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES),
        ]
        | None
    ) = None
    grammar: StructureText | None = None


class FreeStructureFields(RequestModel):
    """Ways to give a completion its form that OpenAI's API does not have.

    Attributes:
        regex: The whole completion matches this regular expression.
        grammar: The completion follows this grammar, in Lark's notation or in GBNF.
        structured_outputs: As vLLM's.
    """

    regex: StructureText | None = None
    grammar: StructureText | None = None
    structured_outputs: StructuredOutputs | None = None


class StructureFields(FreeStructureFields):
    """The request fields that give a completion its form; at most one of them.

    Attributes:
        response_format: As OpenAI's.
    """

    response_format: ResponseFormat | None = None
