"""What a KV head keeps."""

from dataclasses import dataclass

from headlong.kernels.batch import UNBOUNDED


@dataclass(frozen=True, slots=True)
class HeadPolicy:
    """A query at position t sees key j iff j <= t and (j < sink_size or j > t - window_size).

    Attributes:
        sink_size: First tokens that stay visible for ever.
        window_size: Last tokens that are visible, the query's own included; `UNBOUNDED` for a
            retrieval head.

    Raises:
        ValueError: A size is out of range.
    """

    sink_size: int
    window_size: int

    def __post_init__(self) -> None:
        if self.sink_size < 0:
            raise ValueError(f"sink_size must be 0 or more, got {self.sink_size}")
        if not 1 <= self.window_size <= UNBOUNDED:
            raise ValueError(f"window_size must be in 1 to {UNBOUNDED}, got {self.window_size}")

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever dropped."""
        return self.window_size == UNBOUNDED

    def sink_blocks(self, block_size: int) -> int:
        """Blocks that hold the sink tokens; 0 if nothing is ever dropped, so none stand apart."""
        return 0 if self.keeps_all else -(-self.sink_size // block_size)

    def window_start(self, num_tokens: int, block_size: int) -> int:
        """First block after the sinks that queries from position `num_tokens` on can reach."""
        first_visible = max(0, num_tokens - self.window_size + 1)
        return max(self.sink_blocks(block_size), first_visible // block_size)

    def steady_blocks(self, num_tokens: int, block_size: int) -> int:
        """Most blocks owned between steps by a sequence of up to `num_tokens` tokens."""
        all_blocks = -(-num_tokens // block_size)
        if self.keeps_all:
            return all_blocks
        # The next query sees itself and window_size - 1 tokens, which can begin inside a block.
        window_blocks = -(-max(self.window_size - 2, 0) // block_size) + 1
        return min(all_blocks, self.sink_blocks(block_size) + window_blocks)

    def step_blocks(self, num_tokens: int, block_size: int) -> int:
        """Most blocks owned in a step of one token by a sequence of up to `num_tokens` tokens."""
        all_blocks = -(-num_tokens // block_size)
        if self.keeps_all:
            return all_blocks
        # The query's own token is among them, and its window can begin inside a block.
        window_blocks = -(-(self.window_size - 1) // block_size) + 1
        return min(all_blocks, self.sink_blocks(block_size) + window_blocks)

    def reachable_blocks(self, num_blocks: int, block_size: int) -> list[int]:
        """Of the first `num_blocks` full blocks, those that queries after them can reach."""
        sinks = min(self.sink_blocks(block_size), num_blocks)
        start = self.window_start(num_blocks * block_size, block_size)
        return [*range(sinks), *range(start, num_blocks)]

    def live_blocks(self, num_tokens: int, num_new: int, block_size: int) -> int:
        """Blocks owned while `num_new` tokens are computed after `num_tokens` cached ones."""
        end = -(-(num_tokens + num_new) // block_size)
        sinks = min(self.sink_blocks(block_size), end)
        return sinks + max(0, end - self.window_start(num_tokens, block_size))


RETRIEVAL = HeadPolicy(sink_size=0, window_size=UNBOUNDED)
