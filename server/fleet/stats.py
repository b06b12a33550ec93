"""The stats of several engines as those of one."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from headlong.server.engine.status import CanaryStats, EngineStats, TierStats

MAX_GONE = 32

_MISSES = "prefix_misses_total"
_TOTALS = tuple(
    each.name
    for each in fields(EngineStats)
    if each.name.endswith("_total") and each.name != _MISSES
)
_LEVELS = ("num_running", "num_waiting", "kv_bytes_owned", "kv_bytes_full")
_BLOCKS = ("owned_blocks", "cached_blocks", "free_blocks")
_LAST_STEP = ("step_prefill_tokens", "step_decode_tokens", "step_s")


class FleetStats:
    """Adds up the latest stats of all replicas.

    What a replica counted stays in the sums when it is gone, so that totals never fall.

    Attributes:
        replicas: The latest stats of those that are there, by id.
    """

    def __init__(self) -> None:
        self.replicas: dict[str, EngineStats] = {}
        self._gone: dict[str, EngineStats] = {}
        self._past = EngineStats()
        self._total: EngineStats | None = None

    def update(self, replica: str, stats: EngineStats) -> EngineStats:
        """Take a replica's stats.

        Returns:
            Those of all, with this one's last step.
        """
        known = self.replicas.get(replica)
        # Two ways lead here, and what was said first may come last.
        if known is None or (stats.steps_total >= known.steps_total and stats != known):
            self._gone.pop(replica, None)
            self.replicas[replica] = stats
            self._total = None
        last = self.replicas[replica]
        return replace(self.total(), **{name: getattr(last, name) for name in _LAST_STEP})

    def keep(self, replicas: Iterable[str]) -> None:
        """Learn which replicas there are."""
        for gone in self.replicas.keys() - set(replicas):
            # One that is only out of reach may come back.
            self._gone[gone] = _at_rest(self.replicas.pop(gone))
            self._total = None
        while len(self._gone) > MAX_GONE:
            oldest = next(iter(self._gone))
            self._past = _sum([self._past, self._gone.pop(oldest)])

    def total(self) -> EngineStats:
        """The sums over all replicas."""
        # Each output of a step brings that step's stats, and the sums are the same.
        if self._total is None:
            self._total = _sum([*self.replicas.values(), *self._gone.values(), self._past])
        return self._total


def _at_rest(stats: EngineStats) -> EngineStats:
    """What is left of an engine that ended: its counters."""
    totals = {name: getattr(stats, name) for name in (*_TOTALS, _MISSES)}
    tiers = replace(stats.tiers, host_bytes=0, disk_bytes=0)
    return EngineStats(canary=stats.canary, tiers=tiers, **totals)


def _sum(several: Sequence[EngineStats]) -> EngineStats:
    sums: dict[str, Any] = {
        name: sum(getattr(each, name) for each in several) for name in (*_TOTALS, *_LEVELS)
    }
    for name in _BLOCKS:
        counts = [getattr(each, name) for each in several if getattr(each, name)]
        sums[name] = tuple(map(sum, zip(*counts, strict=True)))
    sums[_MISSES] = _sum_by_name(each.prefix_misses_total for each in several)
    return EngineStats(
        **sums,
        canary=_sum_canaries([each.canary for each in several]),
        tiers=_sum_tiers([each.tiers for each in several]),
    )


def _sum_canaries(several: Sequence[CanaryStats]) -> CanaryStats:
    return CanaryStats(
        requests=sum(each.requests for each in several),
        tokens=sum(each.tokens for each in several),
        kl_sum=sum(each.kl_sum for each in several),
        top1_agreed=sum(each.top1_agreed for each in several),
        skipped=_sum_by_name(each.skipped for each in several),
    )


def _sum_tiers(several: Sequence[TierStats]) -> TierStats:
    seconds = TierStats().moved_seconds
    return TierStats(
        host_bytes=sum(each.host_bytes for each in several),
        disk_bytes=sum(each.disk_bytes for each in several),
        loaded_tokens=sum(each.loaded_tokens for each in several),
        recomputed_tokens=sum(each.recomputed_tokens for each in several),
        resumes=_sum_by_name(each.resumes for each in several),
        moved_bytes=_sum_by_name(each.moved_bytes for each in several),
        moved_seconds={
            way: sum(each.moved_seconds.get(way, 0.0) for each in several) for way in seconds
        },
        lost_blocks=_sum_by_name(each.lost_blocks for each in several),
    )


def _sum_by_name(several: Iterable[Mapping[str, int]]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for each in several:
        sums.update(each)
    return dict(sums)
