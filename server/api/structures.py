"""From a request's fields to the form that its completions must have."""

import json
import re

from headlong.server.api.schemas_structures import (
    JSONObjectFormat,
    JSONSchema,
    JSONSchemaFormat,
    StructuredOutputs,
    StructureFields,
)
from headlong.server.api.unsupported import Neutral, refuse_unsupported
from headlong.server.engine.sampling_params import (
    MAX_STRUCTURE_CHARS,
    Structure,
    StructureKind,
    check_param,
)
from headlong.server.errors import InvalidRequestError

# What vLLM's form of these fields knows beside what is supported.
_STRUCTURED_OUTPUTS_FIELDS: Neutral = {
    "disable_additional_properties": (False,),
    "disable_any_whitespace": (False,),
    "disable_fallback": (False, True),
    "structural_tag": (),
    "whitespace_pattern": (),
}
_REGEX_META = re.compile(r"[\\.+*?()|\[\]{}^$]")


def structure_of(request: StructureFields) -> Structure | None:
    """Reads the form that a request asks for.

    Args:
        request: Its `response_format`, `regex`, `grammar` and `structured_outputs`.

    Returns:
        The one form that it asks for, or None if any text will do.

    Raises:
        InvalidRequestError: It asks for more than one, or for what is not supported.
    """
    asked = [
        each
        for each in (
            _of_response_format(request),
            _of_text("regex", request.regex, "regex"),
            _of_text("grammar", request.grammar, "grammar"),
            *_of_structured_outputs(request.structured_outputs),
        )
        if each is not None
    ]
    if len(asked) > 1:
        first, second = asked[0].param, asked[1].param
        raise InvalidRequestError(f"{first} and {second} exclude each other, give one", second)
    return asked[0] if asked else None


def json_schema_structure(schema: JSONSchema, param: str) -> Structure:
    """A JSON Schema as a structure.

    Args:
        schema: The schema.
        param: The request field that it stands in.

    Raises:
        InvalidRequestError: It is too long.
    """
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    return _structure("json_schema", text, param)


def choice_structure(choices: list[str], param: str) -> Structure:
    """A structure that only some texts have.

    Args:
        choices: The texts, none empty.
        param: The request field that they stand in.

    Raises:
        InvalidRequestError: They are too long.
    """
    escaped = (_REGEX_META.sub(r"\\\g<0>", choice) for choice in dict.fromkeys(choices))
    return _structure("regex", "|".join(escaped), param)


def _of_response_format(request: StructureFields) -> Structure | None:
    form = request.response_format
    if isinstance(form, JSONObjectFormat):
        return Structure("json_object", param="response_format")
    if isinstance(form, JSONSchemaFormat):
        return json_schema_structure(form.json_schema.schema_, "response_format")
    return None


def _of_structured_outputs(asked: StructuredOutputs | None) -> list[Structure | None]:
    if asked is None:
        return []
    prefix = "structured_outputs."
    refuse_unsupported(asked.model_extra, _STRUCTURED_OUTPUTS_FIELDS, prefix)
    schema = asked.json_
    if isinstance(schema, str):
        of_json = _of_text("json_schema", schema, f"{prefix}json")
    else:
        of_json = None if schema is None else json_schema_structure(schema, f"{prefix}json")
    found = [
        of_json,
        Structure("json_object", param=f"{prefix}json_object") if asked.json_object else None,
        _of_text("regex", asked.regex, f"{prefix}regex"),
        None if asked.choice is None else choice_structure(asked.choice, f"{prefix}choice"),
        _of_text("grammar", asked.grammar, f"{prefix}grammar"),
    ]
    if not any(found):
        raise InvalidRequestError(
            "structured_outputs must have one of json, json_object, regex, choice and grammar",
            "structured_outputs",
        )
    return found


def _of_text(kind: StructureKind, text: str | None, param: str) -> Structure | None:
    return None if text is None else _structure(kind, text, param)


def _structure(kind: StructureKind, text: str, param: str) -> Structure:
    length = len(text)
    limit = MAX_STRUCTURE_CHARS
    check_param(length <= limit, param, f"{length} characters", f"{limit} characters or fewer")
    return Structure(kind, text, param)
