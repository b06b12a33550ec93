"""One sequence's blocks in one head group."""

from array import array
from collections.abc import Mapping, Sequence

from headlong.cache.policy import HeadPolicy


class BlockTable:
    """The blocks a sequence still owns: sink blocks first, then the window's.

    Logical block i holds tokens i * block_size to (i + 1) * block_size - 1. Blocks between the
    sink blocks and `window_start` have been given back.

    Args:
        policy: What the group keeps of this sequence.
        block_size: Tokens of a block.

    Attributes:
        blocks: Block ids (int32), sink blocks then window blocks.
        window_start: Logical index of the first block after the sink blocks that is still owned.
    """

    __slots__ = ("block_size", "blocks", "num_sink_blocks", "policy", "window_start")

    def __init__(self, policy: HeadPolicy, block_size: int) -> None:
        self.policy = policy
        self.block_size = block_size
        self.num_sink_blocks = policy.sink_blocks(block_size)
        self.window_start = self.num_sink_blocks
        self.blocks = array("i")

    @property
    def num_logical_blocks(self) -> int:
        """Blocks of the sequence so far, those given back included."""
        return len(self.blocks) + self.window_start - self.num_sink_blocks

    def num_blocks_after(self, first: int) -> int:
        """Blocks without those of the first logical ones that are never given back."""
        return len(self.blocks) - (
            first if self.policy.keeps_all else min(first, self.num_sink_blocks)
        )

    @property
    def window_blocks(self) -> "array[int]":
        """The blocks that will be given back as the window moves; none if all are kept."""
        return array("i") if self.policy.keeps_all else self.blocks[self.num_sink_blocks :]

    def start_with(self, blocks: Sequence[int], num_tokens: int) -> None:
        """Begin with shared blocks, those that the table keeps of `num_tokens` tokens."""
        self.blocks = array("i", blocks)
        self.window_start = self.policy.window_start(num_tokens, self.block_size)

    def missing_blocks(self, num_tokens: int) -> int:
        """Blocks to add so that the table holds `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.block_size) - self.num_logical_blocks)

    def add(self, blocks: list[int]) -> None:
        """Append blocks for the tokens that come next."""
        self.blocks.extend(blocks)

    def find(self, logical: int) -> int | None:
        """The block at a logical index, if the table still owns it."""
        if logical >= self.num_sink_blocks:
            logical -= self.window_start - self.num_sink_blocks
            if logical < self.num_sink_blocks:
                return None
        return self.blocks[logical] if logical < len(self.blocks) else None

    def relocate(self, places: Mapping[int, int]) -> None:
        """Take over where blocks lie now, by where they lay before."""
        for index, block in enumerate(self.blocks):
            if block in places:
                self.blocks[index] = places[block]

    def take_expired(self, num_tokens: int) -> list[int]:
        """Remove and return the blocks that no query from position `num_tokens` on can reach."""
        start = self.policy.window_start(num_tokens, self.block_size)
        count = start - self.window_start
        if count <= 0:
            return []
        first = self.num_sink_blocks
        expired = self.blocks[first : first + count]
        del self.blocks[first : first + count]
        self.window_start += len(expired)
        return expired.tolist()
