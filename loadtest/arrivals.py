"""When sessions begin in an open loop: no matter how fast the server answers.

The first begins at 0; those after it follow a renewal process, whose gaps have the mean 1 / rate.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

from headlong.loadtest.checks import check_positive

ArrivalKind = Literal["constant", "poisson", "gamma", "ramp"]


@dataclass(frozen=True, slots=True)
class Arrivals:
    """A process of arrivals; equal values give equal times.

    Attributes:
        kind: ``"constant"``: equal gaps; ``"poisson"``: exponential ones; ``"gamma"``: more or less
            bursty; ``"ramp"``: Poisson whose rate changes linearly and then stays.
        rate: Sessions a second; of a ramp the rate that it reaches.
        burstiness: Shape of the gaps' gamma distribution, as in vLLM's bench: 1 is Poisson, less is
            burstier, more is more regular. Only of ``"gamma"``.
        from_rate: The rate that a ramp begins with; 0 is allowed. Only of ``"ramp"``.
        duration_s: How long a ramp takes. Only of ``"ramp"``.
        seed: Of the chance.

    Raises:
        ValueError: If the kind is unknown, a number is out of its range or not finite, or one is
            missing or given that the kind has not.
    """

    kind: ArrivalKind
    rate: float
    burstiness: float | None = None
    from_rate: float | None = None
    duration_s: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(ArrivalKind):
            raise ValueError(
                f"kind must be one of {', '.join(get_args(ArrivalKind))}, got {self.kind}"
            )
        check_positive(rate=self.rate)
        needed = {"gamma": ("burstiness",), "ramp": ("from_rate", "duration_s")}.get(self.kind, ())
        for name in ("burstiness", "from_rate", "duration_s"):
            value = getattr(self, name)
            if value is not None and name not in needed:
                raise ValueError(f"{name}={value} means nothing for {self.kind} arrivals")
            if value is None and name in needed:
                raise ValueError(f"{self.kind} arrivals need {name}")
        if self.burstiness is not None:
            check_positive(burstiness=self.burstiness)
        if self.duration_s is not None:
            check_positive(duration_s=self.duration_s)
        if self.from_rate is not None and not 0 <= self.from_rate < math.inf:
            raise ValueError(f"from_rate must be at least 0 and finite, got {self.from_rate}")

    def times(self, count: int) -> list[float]:
        """Returns when the first ``count`` sessions begin, ascending, in seconds after the start.

        More sessions keep the times that fewer had.
        """
        return list(islice(self._times(), count))

    def _times(self) -> Iterator[float]:
        rng = random.Random(f"arrivals {self.seed}")
        gaps = 0.0
        while True:
            yield self._time_after(gaps)
            gaps += self._unit_gap(rng)

    def _unit_gap(self, rng: random.Random) -> float:
        """A gap with the mean 1."""
        if self.kind == "constant":
            return 1.0
        if self.burstiness is not None:
            return rng.gammavariate(self.burstiness, 1 / self.burstiness)
        return rng.expovariate(1.0)

    def _time_after(self, gaps: float) -> float:
        """Returns when the rate, added up from 0 on, has reached a sum.

        On a ramp that is from_rate · t + slope / 2 · t² = gaps, solved without the difference of
        two near numbers.
        """
        if self.from_rate is None or self.duration_s is None:
            return gaps / self.rate
        on_ramp = (self.from_rate + self.rate) / 2 * self.duration_s
        if gaps >= on_ramp:
            return self.duration_s + (gaps - on_ramp) / self.rate
        if gaps == 0:
            return 0.0
        slope = (self.rate - self.from_rate) / self.duration_s
        root = math.sqrt(max(0.0, self.from_rate**2 + 2 * slope * gaps))
        return min(2 * gaps / (self.from_rate + root), self.duration_s)


def constant(rate: float) -> Arrivals:
    """Arrivals with equal gaps: ``rate`` a second."""
    return Arrivals("constant", rate)


def poisson(rate: float, seed: int = 0) -> Arrivals:
    """Arrivals that know nothing of each other: ``rate`` a second on average."""
    return Arrivals("poisson", rate, seed=seed)


def gamma(rate: float, burstiness: float, seed: int = 0) -> Arrivals:
    """Arrivals in bursts (``burstiness`` under 1) or more regular ones (above 1)."""
    return Arrivals("gamma", rate, burstiness=burstiness, seed=seed)


def ramp(from_rate: float, to_rate: float, duration_s: float, seed: int = 0) -> Arrivals:
    """Poisson arrivals whose rate goes from one to another in ``duration_s``, and stays there."""
    return Arrivals("ramp", to_rate, from_rate=from_rate, duration_s=duration_s, seed=seed)
