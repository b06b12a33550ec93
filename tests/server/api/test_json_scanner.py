import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headlong.server.api.json_scanner import Mark, ObjectScanner

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS.filter(lambda value: value not in (float("inf"), float("-inf"))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=4)


def scan(text: str) -> list[Mark]:
    """Marks up to the end of the object, or to what breaks it."""
    scanner = ObjectScanner()
    marks = []
    for char in text:
        marks.append(scanner.push(char))
        if marks[-1] in (Mark.END, Mark.BROKEN):
            break
    return marks


def is_object(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        value = json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return isinstance(value, dict)


@given(OBJECTS, st.booleans(), st.sampled_from([None, 1]))
def test_an_object_ends_with_its_last_brace(
    value: dict[str, object], ascii_only: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    marks = scan(text + " and more")
    assert marks[-1] is Mark.END
    assert len(marks) == len(text)
    assert marks.count(Mark.KEY) == marks.count(Mark.VALUE) == len(value)


@given(OBJECTS, st.data())
def test_one_wrong_character_is_found_exactly_where_json_refuses_the_text(
    value: dict[str, object], data: st.DataObject
) -> None:
    text = json.dumps(value)
    place = data.draw(st.integers(1, len(text) - 1))
    char = data.draw(st.sampled_from('{}[]",:\\ 0-.eEtu\n\x01x'))
    text = text[:place] + char + text[place + 1 :]
    marks = scan(text)
    ended = marks[-1] is Mark.END and not text[len(marks) :].strip()
    assert ended == is_object(text)


def test_marks_are_of_the_outermost_members() -> None:
    text = '{"a": "x", "b": {"c": []}, "d": 1}'
    marks = scan(text)
    keys = [index for index, mark in enumerate(marks) if mark is Mark.KEY]
    begins = [text[index] for index, mark in enumerate(marks) if mark is Mark.VALUE]
    ends = [text[index] for index, mark in enumerate(marks) if mark is Mark.VALUE_END]
    assert [text[index - 1] for index in keys] == ["a", "b", "d"]
    assert begins == ['"', "{", "1"]
    assert ends == ['"', "}"]


@pytest.mark.parametrize("written", [r"\u0066oo", r"f\"o", "é☃", r"\ud83d\ude00"])
def test_a_string_is_decoded(written: str) -> None:
    scanner = ObjectScanner()
    for char in f'{{"{written}"':
        scanner.push(char)
    assert scanner.string == json.loads(f'"{written}"')
