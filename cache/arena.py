"""The memory of the cache: one allocation, made at start."""

from collections.abc import Iterable

import torch

from headlong.cache.block_copy import BlockCopy
from headlong.kernels.layout import ArenaLayout


class Arena:
    """All pages of all groups.

    Args:
        layout: The arena's map.
        device: Where it lies.

    Attributes:
        memory: uint8 [total_bytes].
    """

    def __init__(self, layout: ArenaLayout, device: torch.device) -> None:
        self.layout = layout
        # Zeros, not empty: the operating system hands the memory over now and not while serving.
        self.memory = torch.zeros(layout.total_bytes, dtype=torch.uint8, device=device)
        self._groups = [layout.view_group(self.memory, group) for group in range(layout.num_groups)]

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """Copy whole blocks."""
        for copy in copies:
            pages = self._groups[copy.group]
            pages[copy.target].copy_(pages[copy.source])
