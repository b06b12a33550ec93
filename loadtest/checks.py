"""Checks of the numbers that make a load test."""

import math


def check_at_least(least: int, **values: int) -> None:
    """Checks whole numbers, each given by its name.

    Raises:
        ValueError: If one is smaller; it names the first.
    """
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_positive(**values: float) -> None:
    """Checks numbers that something is divided by, each given by its name.

    Raises:
        ValueError: If one is not above 0, not finite, or so small that one over it is not; it names
            the first.
    """
    for name, value in values.items():
        if not (0 < value < math.inf and 1 / value < math.inf):
            raise ValueError(f"{name} must be above 0 and finite, got {value}")
