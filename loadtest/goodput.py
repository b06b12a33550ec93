"""Goodput: which requests were answered as fast as was promised."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from headlong.loadtest.records import RequestRecord

_ALIASES = {"e2e": "e2el"}


@dataclass(frozen=True, slots=True)
class Goodput:
    """Limits, in milliseconds, that a request keeps to be a good one; None is no limit.

    Attributes:
        ttft: Time to the first piece of text.
        tpot: Time of each token after the first, on average.
        itl: Longest time between two neighbouring pieces of text.
        e2el: Time to the end.

    Raises:
        ValueError: If there is no limit, or one is not above 0 and finite.
    """

    ttft: float | None = None
    tpot: float | None = None
    itl: float | None = None
    e2el: float | None = None

    def __post_init__(self) -> None:
        limits = [(field.name, getattr(self, field.name)) for field in fields(self)]
        if all(limit is None for _, limit in limits):
            raise ValueError("goodput needs at least one limit, such as ttft:500")
        for name, limit in limits:
            if limit is not None and not 0 < limit < math.inf:
                raise ValueError(
                    f"goodput {name} must be milliseconds above 0 and finite, got {limit}"
                )

    def met(self, record: RequestRecord) -> bool:
        """Tells whether a request kept every limit.

        A failed one never does, nor one without what a limit needs: any text, or the server's count
        of tokens. An answer of one token has none after the first that could be late. Whether an
        answer is right plays no part.
        """
        if record.error is not None:
            return False
        return (
            _kept(self.ttft, record.ttft_s)
            and _kept(self.tpot, _tpot_s(record))
            and _kept(self.itl, _longest_gap_s(record))
            and _kept(self.e2el, record.e2e_s)
        )


def parse_goodput(limits: Iterable[str]) -> Goodput:
    """Reads limits such as ``ttft:500`` and ``tpot:50``, in milliseconds.

    Args:
        limits: One or several limits each, the latter separated by spaces or commas; ``e2e`` is
            another name of ``e2el``.

    Raises:
        ValueError: If a limit is not a known name and a number above 0, or a name comes twice.
    """
    known = [field.name for field in fields(Goodput)]
    found: dict[str, float] = {}
    for limit in " ".join(limits).replace(",", " ").split():
        name, _, text = limit.partition(":")
        name = _ALIASES.get(name, name)
        if name not in known:
            raise ValueError(
                f"goodput limit {limit!r} is unknown: write NAME:MILLISECONDS with one of the "
                f"names {', '.join(known)}"
            )
        if name in found:
            raise ValueError(f"goodput limit {name} is given twice")
        try:
            found[name] = float(text)
        except ValueError as error:
            raise ValueError(
                f"goodput {name} must be a number of milliseconds, got {text!r}"
            ) from error
    return Goodput(**found)


def _kept(limit_ms: float | None, seconds: float | None) -> bool:
    return limit_ms is None or (seconds is not None and seconds * 1000 <= limit_ms)


def _tpot_s(record: RequestRecord) -> float | None:
    return 0.0 if record.num_completion_tokens in {0, 1} else record.tpot_s


def _longest_gap_s(record: RequestRecord) -> float | None:
    return max(record.itl_s, default=0.0) if record.token_times_s else None
