"""Copies of blocks within the arena."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Contents that must be copied before the next step writes."""

    group: int
    source: int
    target: int
