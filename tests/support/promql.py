"""Which metrics and labels PromQL expressions speak of, and which series a scrape has."""

import re
from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families

# A name that is no function, keyword, label, duration or text: those are taken out first.
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_TEXT = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|`[^`]*`")
_VARIABLE = re.compile(r"\$\{\w+(?::\w+)?\}|\$\w+|\[\[\w+\]\]")
_RANGE = re.compile(r"\[[^\]]*\]")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_SELECTOR = re.compile(r"\{([^}]*)\}")
_LABEL = re.compile(r"([a-zA-Z_][a-zA-Z0-9_]*)\s*(?:=~|!~|!=|=)")
_NUMBER = re.compile(r"\b\d[\w.]*(?:[eE][+-]?\d+)?")
_CALL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*\s*(?=\()")
_KEYWORDS = frozenset(
    {"and", "or", "unless", "bool", "offset", "inf", "nan", "by", "without", "on", "ignoring"}
    | {"group_left", "group_right", "start", "end"}
)


def metric_names(expression: str) -> set[str]:
    """Names of the series that an expression reads.

    Args:
        expression: PromQL, with or without Grafana's variables.

    Returns:
        Such as ``headlong:num_requests_waiting``; of a histogram the series with its suffix.
    """
    return {name for name, _ in _series(expression)}


def labels_of(expression: str) -> dict[str, set[str]]:
    """Labels that an expression asks each of its metrics for, in braces.

    Labels that it groups by are those of all: see `grouping_labels`.
    """
    found: dict[str, set[str]] = {}
    for name, labels in _series(expression):
        found.setdefault(name, set()).update(labels)
    return found


def grouping_labels(expression: str) -> set[str]:
    """Labels that an expression groups or matches by."""
    plain = _VARIABLE.sub("x", _TEXT.sub('""', expression))
    groups = (group.partition("(")[2] for group in _GROUPING.findall(plain))
    return {label for group in groups for label in _NAME.findall(group)}


def scraped_series(text: str) -> dict[str, set[str]]:
    """Names of the series of a scrape in Prometheus' text format, each with its labels.

    A family that has no sample yet counts by its own name, so that what only appears with the
    first event, such as a rejection, is known, too.
    """
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        if not family.samples:
            suffix = "_total" if family.type == "counter" else ""
            found.setdefault(family.name + suffix, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def _series(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Each name in an expression, with the labels in the braces behind it."""
    plain = _TEXT.sub('""', expression)
    plain = _RANGE.sub(" ", plain)
    plain = _VARIABLE.sub("0", plain)
    plain = _GROUPING.sub(" ", plain)
    selectors = _SELECTOR.findall(plain)
    # A selector becomes a number in brackets, which no other part of PromQL is after this.
    numbers = iter(range(len(selectors)))
    plain = _SELECTOR.sub(lambda _: f"[{next(numbers)}]", plain)
    plain = _CALL.sub(" ", plain)
    for match in re.finditer(rf"({_NAME.pattern})\s*(?:\[(\d+)\])?", _without_numbers(plain)):
        name, selector = match.groups()
        if name.lower() not in _KEYWORDS:
            labels = _LABEL.findall(selectors[int(selector)]) if selector else []
            yield name, set(labels)


def _without_numbers(text: str) -> str:
    """Takes out numbers and durations, but not the marks of selectors."""
    return re.sub(rf"\[\d+\]|{_NUMBER.pattern}", _keep_marks, text)


def _keep_marks(match: re.Match[str]) -> str:
    return match[0] if match[0].startswith("[") else " "
