"""How fast something goes, by what was measured last."""

DECAY = 0.9
"""What an earlier measurement counts for at each later one."""


class MovingRate:
    """Amounts over seconds, of which older ones count less and less.

    Sums are kept of both, so that a long measurement counts for more than a short one.
    """

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0

    def add(self, amount: float, seconds: float) -> None:
        """Take a measurement in.

        Args:
            amount: What was done.
            seconds: How long it took.
        """
        self._amount = DECAY * self._amount + amount
        self._seconds = DECAY * self._seconds + seconds

    @property
    def per_second(self) -> float | None:
        """The rate; None before the first measurement."""
        return self._amount / self._seconds if self._seconds > 0 else None
