"""Grammars of answers that call tools, in llguidance's variant of Lark's notation."""

import json
from collections.abc import Sequence

from headlong.server.api.schemas_structures import JSONSchema
from headlong.server.api.schemas_tools import FunctionDefinition
from headlong.server.api.tool_styles import ToolStyle

_NO_PARAMETERS: JSONSchema = {"properties": {}, "additionalProperties": False}


def tool_grammar(
    style: ToolStyle, functions: Sequence[FunctionDefinition], *, forced: bool, parallel: bool
) -> str:
    """Writes the grammar of an answer.

    Calls look as the chat templates show them to the model: one line of JSON with a space after
    each comma and colon.

    Args:
        style: How calls are written.
        functions: What may be called, at least one.
        forced: The answer is calls and nothing else; otherwise it may be text, and have calls.
        parallel: There may be several calls.
    """
    rules = _hermes(style, forced, parallel) if style.end else _llama3(style, forced, parallel)
    key = style.arguments_keys[0]
    rules.append("function: " + " | ".join(f"f{index}" for index in range(len(functions))))
    for index, function in enumerate(functions):
        head = json.dumps(f'{{"name": "{function.name}", "{key}": ')
        rules.append(f'f{index}: {head} %json {json.dumps(_arguments(function))} "}}"')
    return "\n".join(["%llguidance {}", *rules, ""])


def _hermes(style: ToolStyle, forced: bool, parallel: bool) -> list[str]:
    begin, end = _mark(style, style.begin), _mark(style, style.end)
    call = f'"\\n" function "\\n" {end}'
    if forced:
        start = 'start: call ("\\n" call)*' if parallel else "start: call"
        return [start, f"call: {begin} {call}"]
    start = "start: called* TEXT" if parallel else "start: TEXT | called"
    text = rf"TEXT: /(.|\n)*/ & ~/(.|\n)*{style.begin}(.|\n)*/"
    if style.begin in style.tokens:
        return [start, f"called: TEXT {begin} {call}", text]
    # Lazy, it ends with the first mark.
    opening = rf"opening[lazy]: /(.|\n)*{style.begin}/"
    return [start, f"called: opening {call}", opening, text]


def _llama3(style: ToolStyle, forced: bool, parallel: bool) -> list[str]:
    calls = 'calls: function ("; " function)*' if parallel else "calls: function"
    if forced:
        return ["start: calls", calls]
    # What begins with a brace would be read as a call.
    text = r"TEXT: /([^{\s](.|\n)*)?/"
    opening = f"{style.begin}? " if style.begin in style.tokens else ""
    return [f"start: TEXT | {opening}calls", calls, text]


def _mark(style: ToolStyle, mark: str) -> str:
    # To a grammar a token of this form has a name, and no text.
    return mark if mark in style.tokens else json.dumps(mark)


def _arguments(function: FunctionDefinition) -> JSONSchema:
    """The schema of its arguments, always of an object, with the layout of `json.dumps`."""
    layout: JSONSchema = {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
        # What cannot be enforced of a schema that need not be is left to the model.
        "lenient": function.strict is not True,
    }
    schema = _NO_PARAMETERS if function.parameters is None else function.parameters
    return {**schema, "type": "object", "x-guidance": layout}
