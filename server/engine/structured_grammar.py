"""Puts a structure into the form that llguidance compiles."""

import json
import re

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from headlong.server.engine.sampling_params import (
    MAX_STRUCTURE_CHARS,
    Structure,
    check_param,
)
from headlong.server.errors import InvalidRequestError

# Where the text is certain llguidance would pick its tokens, and fails on text that is also the
# name of a special token. The model picks them better.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
# Between the tokens of JSON a space, or a line break and the next line's indentation: a model that
# were free to write any white space may never write anything else.
JSON_WHITE_SPACE = r" |\r?\n[ \t]{0,40}"
# Terminals that refer to one another take time with the cube of their number.
MAX_GRAMMAR_LINES = 500
# The converter looks at all rules once for each.
MAX_GBNF_RULES = 500
_GBNF_ROOT = re.compile(r"^[ \t]*root[ \t]*::=", re.MULTILINE)


def llguidance_grammar(structure: Structure) -> str:
    """Translates a structure.

    Args:
        structure: A grammar is GBNF if a line of it begins with ``root ::=``, and Lark otherwise.

    Returns:
        JSON in llguidance's own form; what it describes is not checked yet.

    Raises:
        InvalidRequestError: The text is too long, or is no JSON Schema or GBNF.
    """
    text, param = structure.text, structure.param
    limit = MAX_STRUCTURE_CHARS
    check_param(len(text) <= limit, param, f"{len(text)} characters", f"{limit} or fewer")
    if "\0" in text:
        raise InvalidRequestError(f"{param} holds a NUL character", param)
    match structure.kind:
        case "json_object":
            return _of_schema('{"type":"object"}', param)
        case "json_schema":
            return _of_schema(text, param)
        case "regex":
            (grammar,) = json.loads(LLMatcher.grammar_from_regex(text))["grammars"]
            return LLMatcher.grammar_from_lark(_OPTIONS + grammar["lark_grammar"])
        case "grammar":
            lines = text.count("\n") + 1
            most = MAX_GRAMMAR_LINES
            check_param(lines <= most, param, f"{lines} lines", f"{most} lines or fewer")
            if _GBNF_ROOT.search(text):
                text = _lark_of_gbnf(text, param)
            return LLMatcher.grammar_from_lark(_OPTIONS + text)


def _of_schema(schema: str, param: str) -> str:
    try:
        grammar = LLMatcher.grammar_from_json_schema(
            schema,
            overrides={
                "whitespace_flexible": True,
                "whitespace_pattern": JSON_WHITE_SPACE,
                "item_separator": ",",
                "key_separator": ":",
            },
        )
    except ValueError as error:
        raise InvalidRequestError(f"{param} is no JSON Schema: {error}", param) from None
    (described,) = json.loads(grammar)["grammars"]
    start = {"name": "start", "lark_grammar": f"{_OPTIONS}start: @schema"}
    return json.dumps({"grammars": [start, {**described, "name": "schema"}]})


def _lark_of_gbnf(text: str, param: str) -> str:
    count, most = text.count("::="), MAX_GBNF_RULES
    check_param(count <= most, param, f"{count} rules", f"{most} rules or fewer")
    try:
        return gbnf_to_lark(text)
    except Exception as error:  # it raises plain ones, and fails as Python does on some texts
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InvalidRequestError(f"{param} is no GBNF grammar: {reason}", param) from None
