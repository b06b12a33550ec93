"""Cells and rows of the tables."""

from collections.abc import Sequence

Row = Sequence[str]

GIB = 1 << 30


def over_best(rate: float, best: float | None) -> str:
    return percent(None if best is None else rate / best)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def aligned(rows: list[Row]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
