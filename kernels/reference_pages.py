"""The pages that a sequence still owns in one head group, for one head: what the oracle reads."""

import torch

from headlong.kernels.batch import AttentionBatch
from headlong.kernels.codes import Codes, dequantise
from headlong.kernels.layout import ArenaLayout, PageViews, view_pages


class SequencePages:
    """K and V by position, and what pages say, through a sequence's block table.

    Args:
        arena: uint8 [total_bytes].
        layout: The arena's map.
        batch: Tables of the batch.
        group: Index of the head group.
        page: The head's page within the group's blocks.
        seq: Which sequence of the batch.

    Attributes:
        block_size: Tokens of a page.
        sink_size: Tokens.
        window_size: Tokens.
        page: The head's page within a block.
        views: All pages of the group.
    """

    def __init__(
        self,
        arena: torch.Tensor,
        layout: ArenaLayout,
        batch: AttentionBatch,
        group: int,
        page: int,
        seq: int,
    ) -> None:
        tables = batch.groups[group]
        self.layout = layout.pages[group]
        self.block_size = self.layout.block_size
        self.sink_size = int(tables.sink_sizes[seq])
        self.window_size = int(tables.window_sizes[seq])
        self.page = page
        self.views: PageViews = view_pages(layout, arena, group)
        sink_blocks, window_start = int(tables.sink_blocks[seq]), int(tables.window_starts[seq])
        entries = tables.block_tables[seq, : int(tables.table_lens[seq])].tolist()
        self._blocks: dict[int, int] = {
            entry if entry < sink_blocks else window_start + entry - sink_blocks: block
            for entry, block in enumerate(entries)
        }

    @property
    def logical(self) -> list[int]:
        """Logical indices of the blocks that are still owned, ascending."""
        return sorted(self._blocks)

    def block(self, logical: int) -> int:
        """The block at a logical index."""
        return self._blocks[logical]

    def positions(self, context_len: int, logical: list[int] | None = None) -> torch.Tensor:
        """Positions of the tokens in blocks, by default in all; int64 [num_keys]."""
        size = self.block_size
        found = [
            torch.arange(index * size, min((index + 1) * size, context_len))
            for index in (self.logical if logical is None else logical)
        ]
        return torch.cat(found)

    def keys(self, positions: torch.Tensor) -> torch.Tensor:
        """K of tokens, float64 [num_keys, head_dim]."""
        return self._read(self.views.keys, 0, positions)

    def values(self, positions: torch.Tensor) -> torch.Tensor:
        """V of tokens, float64 [num_keys, head_dim]."""
        return self._read(self.views.values, 1, positions)

    def _read(self, section: torch.Tensor, which: int, positions: torch.Tensor) -> torch.Tensor:
        blocks = torch.tensor([self._blocks[int(p) // self.block_size] for p in positions])
        blocks, offsets = blocks.long(), positions % self.block_size
        found = section[blocks, self.page, offsets]
        if self.layout.quantisation is None:
            return found.double()
        scales, minima = self.views.scales, self.views.minima
        assert scales is not None
        codes = Codes(
            found,
            scales[blocks, self.page, which, offsets],
            None if minima is None else minima[blocks, self.page, which, offsets],
        )
        return dequantise(codes, self.layout.quantisation).double()
