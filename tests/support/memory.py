"""What lies in an arena, byte by byte: where groups share it, none may overwrite another's."""

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

import numpy as np

from headlong.cache.block_copy import BlockCopy
from headlong.kernels.layout import ArenaLayout

Content = TypeVar("Content", bound=Hashable)

TORN = "torn"
"""What is read where a slot's bytes were written at different times."""


class ByteMemory(Generic[Content]):
    """Contents of slots. A token of a block has an equal part of the block's bytes."""

    def __init__(self, layout: ArenaLayout) -> None:
        self._layout = layout
        self._bytes = np.zeros(layout.total_bytes, dtype=np.int64)
        self._contents: list[Content | None] = [None]
        self._codes: dict[Content, int] = {}

    def __setitem__(self, place: tuple[int, int], content: Content) -> None:
        code = self._codes.setdefault(content, len(self._contents))
        if code == len(self._contents):
            self._contents.append(content)
        self._bytes[self._range(*place)] = code

    def __getitem__(self, place: tuple[int, int]) -> Content | str | None:
        codes = self._bytes[self._range(*place)]
        if (codes != codes[0]).any():
            return TORN
        return self._contents[codes[0]]

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """Copies whole blocks, in their order."""
        for copy in copies:
            size = self._layout.block_bytes(copy.group)
            base = self._layout.group_bases[copy.group]
            source, target = base + copy.source * size, base + copy.target * size
            self._bytes[target : target + size] = self._bytes[source : source + size].copy()

    def _range(self, group: int, slot: int) -> slice:
        block_size = self._layout.pages[group].block_size
        size = self._layout.block_bytes(group) // block_size
        block, offset = divmod(slot, block_size)
        start = self._layout.group_bases[group] + block * self._layout.block_bytes(group)
        return slice(start + offset * size, start + (offset + 1) * size)
