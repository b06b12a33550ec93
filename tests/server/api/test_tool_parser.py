import json
import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headlong.server.api.schemas_tools import ToolCall
from headlong.server.api.tool_calls import Answer, call_delta, collect, read_answer
from headlong.server.api.tool_parser import ArgumentsText, CallBegun, ContentText, ToolCallParser
from headlong.server.api.tool_styles import HERMES, LLAMA3_JSON, ToolStyle

NAMES = frozenset({"get_weather", "now"})
WEATHER = '{"name": "get_weather", "arguments": {"city": "Paris {\\"x\\": 1}"}}'
NOW = '{"name": "now", "arguments": {}}'
LLAMA_WEATHER = WEATHER.replace("arguments", "parameters")
LLAMA_NOW = NOW.replace("arguments", "parameters")


def tagged(call: str) -> str:
    return f"<tool_call>\n{call}\n</tool_call>"


def read(style: ToolStyle, text: str) -> Answer:
    return read_answer(ToolCallParser(style, NAMES), text)


def pairs(answer: Answer) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in answer.tool_calls]


WEATHER_PAIR = ("get_weather", '{"city": "Paris {\\"x\\": 1}"}')
NOW_PAIR = ("now", "{}")


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello.", "Hello.", []),
        ("", "", []),
        (" \n", " \n", []),
        (tagged(WEATHER), None, [WEATHER_PAIR]),
        (f"\n{tagged(WEATHER)}\n{tagged(NOW)}\n", None, [WEATHER_PAIR, NOW_PAIR]),
        (f"Let me see.\n\n{tagged(NOW)}", "Let me see.", [NOW_PAIR]),
        (f"a {tagged(NOW)} b", "a b", [NOW_PAIR]),
        (f"a < b <tool {tagged(NOW)}", "a < b <tool", [NOW_PAIR]),
        (f"<<tool_call>{NOW}</tool_call>", "<", [NOW_PAIR]),
        (
            '<tool_call>{"arguments":{"a":[1]},"name":"now"}</tool_call>',
            None,
            [("now", '{"a":[1]}')],
        ),
        (f"<tool_call>{NOW}", None, [NOW_PAIR]),
        (f"<tool_call>{NOW}\n</tool", None, [NOW_PAIR]),
        (f"<tool_call>{NOW}\n<tool_call>{WEATHER}</tool_call>", None, [NOW_PAIR, WEATHER_PAIR]),
        ('<tool_call>{"type": "function", "name": "now", "arguments": {}}', None, [NOW_PAIR]),
        ('<tool_call>{"name": "now", "arguments": {}, "id": 1}', None, [NOW_PAIR]),
    ],
)
def test_hermes(text: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    answer = read(HERMES, text)
    assert (answer.content, pairs(answer)) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>\n",
        "a<tool_call",
        "<tool_call>now()</tool_call>",
        "<tool_call>[]</tool_call>",
        '<tool_call>{"name": "now"}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "rm_rf", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>',
        '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
        '<tool_call>{"arguments": {"a": 1}, "name": "no',
        '<tool_call>{"arguments": {"a": }, "name": "now"}</tool_call>',
        '<tool_call>{"name": "now", "name": "now", "arguments": {}}</tool_call>',
        "<tool_call>{'name': 'now', 'arguments': {}}</tool_call>",
        '<tool_call>{"city": "Paris", "name": "now", "arguments": {}}</tool_call>',
    ],
)
def test_what_is_no_call_is_text_to_the_last_character(text: str) -> None:
    assert read(HERMES, text) == Answer(text, ())


def test_broken_json_goes_on_as_text() -> None:
    """What was told of a call stays told; nothing of the rest is lost."""
    answer = read(HERMES, '<tool_call>{"name": "now", "arguments": {"a": ?}} so <b>')
    assert pairs(answer) == [("now", '{"a": ')]
    assert answer.content == "?}} so <b>"
    answer = read(HERMES, '<tool_call>{"name": "now", "arguments": {}, "x": 2}</tool_call>')
    assert pairs(answer) == [NOW_PAIR]
    assert answer.content == ', "x": 2}</tool_call>'


def test_a_call_cut_short_keeps_what_was_written() -> None:
    answer = read(HERMES, '<tool_call>{"name": "now", "arguments": {"a": "b')
    assert (answer.content, pairs(answer)) == (None, [("now", '{"a": "b')])


@pytest.mark.parametrize(
    ("style", "text", "content", "calls"),
    [
        (HERMES, '\n<tool_call>\n{"name": "get_w', "", []),
        (HERMES, 'Let me see.\n<tool_call>\n{"name": "now", "argu', "Let me see.", []),
        (HERMES, "Well\n<tool_call>\n", "Well", []),
        (HERMES, f'{tagged(NOW)}\n<tool_call>{{"name', None, [NOW_PAIR]),
        (HERMES, '<tool_call>{"name": "now", "arguments": {}, "id', None, [NOW_PAIR]),
        (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "no', "", []),
        # What is no call yet, or none at all, stays text.
        (HERMES, "a <tool_c", "a <tool_c", []),
        (HERMES, '<tool_call>{"name": "rm_rf", "arg', '<tool_call>{"name": "rm_rf", "arg', []),
        (LLAMA3_JSON, '{"name": "get_w', "", []),
        (LLAMA3_JSON, f'{LLAMA_NOW}; {{"name": "no', None, [NOW_PAIR]),
        (LLAMA3_JSON, '{"city": "Par', '{"city": "Par', []),
    ],
)
def test_a_call_that_was_cut_before_its_name_was_told_is_not_shown(
    style: ToolStyle, text: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    answer = read_answer(ToolCallParser(style, NAMES), text, cut=True)
    assert (answer.content, pairs(answer)) == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello.", "Hello.", []),
        ("", "", []),
        ("<|python_tag|>", "<|python_tag|>", []),
        ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        ("<|python_no", "<|python_no", []),
        (LLAMA_WEATHER, None, [WEATHER_PAIR]),
        (f" \n{LLAMA_WEATHER}\n", None, [WEATHER_PAIR]),
        (f"<|python_tag|>{LLAMA_NOW}", None, [NOW_PAIR]),
        (f"{LLAMA_NOW}; {LLAMA_WEATHER};{LLAMA_NOW}", None, [NOW_PAIR, WEATHER_PAIR, NOW_PAIR]),
        (NOW, None, [NOW_PAIR]),
        (f"{LLAMA_NOW} done", " done", [NOW_PAIR]),
        (f"{LLAMA_NOW}; or {LLAMA_NOW}", f"; or {LLAMA_NOW}", [NOW_PAIR]),
        (f"Call {LLAMA_NOW}", f"Call {LLAMA_NOW}", []),
        ('{"city": "Paris"}', '{"city": "Paris"}', []),
        ('{"name": "Paul", "age": 3}', '{"name": "Paul", "age": 3}', []),
        ('{"name": "now"}', '{"name": "now"}', []),
    ],
)
def test_llama3_json(text: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    answer = read(LLAMA3_JSON, text)
    assert (answer.content, pairs(answer)) == (content, calls)


def test_events_come_as_early_as_they_are_certain() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    assert parser.push("Well <") == [ContentText("Well")]
    assert parser.push("b> <tool_call") == [ContentText(" <b>")]
    assert parser.push('>\n{"name": "no') == []
    assert parser.push('w", "argum') == []
    begun, first = parser.push('ents": {"a"')
    assert isinstance(begun, CallBegun)
    assert (begun.index, begun.name) == (0, "now")
    assert re.fullmatch("call_[0-9a-f]{24}", begun.id)
    assert first == ArgumentsText(0, '{"a"')
    assert parser.push(": 1") == [ArgumentsText(0, ": 1")]
    assert parser.push("}}\n</tool_") == [ArgumentsText(0, "}")]
    assert parser.push("call>") == []
    assert parser.num_calls == 1
    assert parser.finish() == []
    assert call_delta(begun).model_dump(exclude_unset=True) == {
        "index": 0,
        "id": begun.id,
        "type": "function",
        "function": {"name": "now", "arguments": ""},
    }
    assert call_delta(first).model_dump(exclude_unset=True) == {
        "index": 0,
        "function": {"arguments": '{"a"'},
    }


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "\n", " ", ";", "text", "<", "}", "{"),
    *(WEATHER, NOW, LLAMA_WEATHER, LLAMA_NOW, tagged(NOW), '{"name": "now", ', '"arguments": {'),
    *('"a": [1, "\\u00e9"]', '"', ",", "\\", '{"name": "nobody", "arguments": {}}'),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=8).map("".join)
STYLES = st.sampled_from([HERMES, LLAMA3_JSON])


def without_ids(answer: Answer) -> tuple[str | None, list[tuple[str, str]]]:
    return answer.content, pairs(answer)


@given(STYLES, TEXTS, st.lists(st.integers(0, 400), max_size=12), st.booleans())
@example(HERMES, f"a\n{tagged(WEATHER)}\n{tagged(NOW)}", list(range(200)), False)
@example(LLAMA3_JSON, f"{LLAMA_WEATHER}; {LLAMA_NOW} b", list(range(200)), False)
def test_a_stream_says_the_same_however_the_text_is_cut(
    style: ToolStyle, text: str, cuts: list[int], short: bool
) -> None:
    parser = ToolCallParser(style, NAMES)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    events = [event for begin, end in pairwise(places) for event in parser.push(text[begin:end])]
    answer = collect([*events, *parser.finish(cut=short)])
    whole = read_answer(ToolCallParser(style, NAMES), text, cut=short)
    assert without_ids(answer) == without_ids(whole)
    ids = [call.id for call in answer.tool_calls]
    assert len(set(ids)) == len(ids) == parser.num_calls


def _is_ordered(part: str, whole: str) -> bool:
    chars = iter(whole)
    return all(char in chars for char in part)


@given(STYLES, TEXTS)
def test_nothing_is_invented_and_nothing_lost(style: ToolStyle, text: str) -> None:
    answer = read(style, text)
    if not answer.tool_calls:
        assert answer.content == text
        return
    assert _is_ordered(answer.content or "", text)
    for call in answer.tool_calls:
        assert call.function.name in NAMES
        assert call.function.arguments in text


@given(st.dictionaries(st.text(), st.integers() | st.text(), max_size=4), st.booleans())
def test_arguments_arrive_as_they_were_written(value: dict[str, object], ascii_only: bool) -> None:
    arguments = json.dumps(value, ensure_ascii=ascii_only)
    text = tagged(f'{{"name": "now", "arguments": {arguments}}}')
    (call,) = read(HERMES, f"Now:\n{text}").tool_calls
    assert isinstance(call, ToolCall)
    assert call.function.arguments == arguments


def test_long_answers_are_read_once() -> None:
    """Text that looks like a call again and again is not read again and again."""
    text = "<tool_call>" * 20_000 + "<tool_call>\n" + " " * 200_000
    assert read(HERMES, text).content == text
