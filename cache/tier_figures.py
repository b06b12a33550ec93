"""What was moved between the tiers of blocks, and what was lost on the way."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Way = Literal["to_host", "from_host", "to_disk", "from_disk"]
"""Where blocks were copied: from the arena to the host and back, from the host to disk and back."""

Loss = Literal["host_busy", "disk_busy", "unwritten", "unreadable"]
"""Why a block was lost: all of the host's memory was busy with copies, it was forgotten there
before its turn to be written came, it could not be written, or its file was wrong or gone."""


@dataclass(slots=True)
class TierFigures:
    """Sums since the start.

    Attributes:
        num_bytes: Bytes that were copied, by `Way`.
        seconds: Time that it took, by the same; what ran side by side counts several times.
        losses: Blocks that were lost, by `Loss`.
    """

    num_bytes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    losses: Counter[str] = field(default_factory=Counter)

    def note(self, way: Way, num_bytes: int, seconds: float) -> None:
        """Add what was copied."""
        self.num_bytes[way] += num_bytes
        self.seconds[way] = self.seconds.get(way, 0.0) + seconds

    def lose(self, loss: Loss) -> None:
        """Count a block that was lost."""
        self.losses[loss] += 1
