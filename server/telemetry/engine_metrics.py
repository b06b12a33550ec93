"""What the engine counts itself, as metrics: read at every scrape, and kept nowhere twice."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, get_args

from prometheus_client import ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from headlong.server.engine.status import (
    CanarySkip,
    CanaryStats,
    EngineInfo,
    EngineStats,
    TierStats,
    group_blocks,
)

if TYPE_CHECKING:
    from headlong.server.async_engine import AsyncEngine, EngineState

_STATES: tuple["EngineState", ...] = ("starting", "ready", "draining", "dead")

PREFIX = "headlong:"
MODEL_LABEL = "model_name"


class EngineCollector(Collector):
    """Reads an engine's latest stats.

    Args:
        engine: Whose.
        model_name: The label of all series.
    """

    def __init__(self, engine: "AsyncEngine", model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name
        pid = engine.info.pid
        self._process = (
            None if pid is None else ProcessCollector(f"{PREFIX}engine", lambda: pid, registry=None)
        )

    def collect(self) -> Iterator[Metric]:
        """Makes the metrics of this moment."""
        info, stats = self._engine.info, self._engine.stats
        yield self._state()
        yield from self._load(stats)
        yield from self._cache(info, stats)
        yield from self._tokens(stats)
        yield from self._tiers(stats.tiers)
        yield from self._canary(stats.canary)
        yield from self._infos(info)
        yield from self._engine_process()

    def describe(self) -> list[Metric]:
        """Names nothing beforehand: no other collector has names like these."""
        return []

    def _state(self) -> Metric:
        family = GaugeMetricFamily(
            f"{PREFIX}engine_state",
            "1 for the state that the engine is in, else 0.",
            labels=[MODEL_LABEL, "state"],
        )
        for state in _STATES:
            family.add_metric([self._model_name, state], state == self._engine.state)
        return family

    def _load(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._gauge("num_requests_running", "Completions that own blocks.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Completions in the queue.", stats.num_waiting)
        yield self._counter(
            "num_preemptions",
            "Times that blocks were taken from a running sequence.",
            stats.preemptions_total,
        )
        yield self._counter("engine_steps", "Steps run.", stats.steps_total)
        yield self._counter("engine_step_seconds", "Time spent in steps.", stats.step_s_total)
        yield self._counter(
            "engine_model_seconds",
            "Of that, time spent in the model's pass and in sampling.",
            stats.model_s_total,
        )

    def _cache(self, info: EngineInfo, stats: EngineStats) -> Iterator[Metric]:
        labels = [MODEL_LABEL, "group"]
        usage = GaugeMetricFamily(
            f"{PREFIX}kv_cache_group_usage_perc",
            "Fraction of a head group's blocks that running sequences own, 0 to 1.",
            labels=labels,
        )
        blocks = GaugeMetricFamily(
            f"{PREFIX}kv_cache_blocks",
            "Blocks of a head group: owned by running sequences, cached without an owner, free.",
            labels=[*labels, "state"],
        )
        fullest = 0.0
        for group, state in zip(info.groups, group_blocks(info, stats), strict=True):
            fullest = max(fullest, state.usage)
            usage.add_metric([self._model_name, group.name], state.usage)
            for name, count in asdict(state).items():
                blocks.add_metric([self._model_name, group.name, name], count)
        yield self._gauge(
            "kv_cache_usage_perc",
            "The same of the group that is fullest: at 1 nothing more is admitted.",
            fullest,
        )
        yield usage
        yield blocks
        yield self._gauge(
            "kv_bytes_capacity",
            "Bytes of all blocks.",
            info.kv_bytes or sum(group.num_blocks * group.block_bytes for group in info.groups),
        )
        yield self._gauge("kv_bytes_owned", "Bytes of all owned blocks.", stats.kv_bytes_owned)
        yield self._gauge(
            "kv_bytes_saved",
            "What a full cache would hold beyond that for the same sequences.",
            max(0, stats.kv_bytes_full - stats.kv_bytes_owned),
        )

    def _tokens(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._counter(
            "prompt_tokens",
            "Prompt tokens computed or found in the prefix cache.",
            stats.prompt_tokens_total,
        )
        yield self._counter("generation_tokens", "Tokens sampled.", stats.generation_tokens_total)
        yield self._counter(
            "prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache.",
            stats.prefix_queries_total,
        )
        yield self._counter("prefix_cache_hits", "Of these, tokens found.", stats.prefix_hits_total)
        yield self._counters(
            "prefix_cache_misses",
            "The others, by why they were not found.",
            "reason",
            stats.prefix_misses_total,
        )

    def _tiers(self, tiers: TierStats) -> Iterator[Metric]:
        yield self._gauge(
            "host_cache_bytes", "Bytes of blocks that the host's memory holds.", tiers.host_bytes
        )
        yield self._gauge("disk_cache_bytes", "Bytes of blocks in files.", tiers.disk_bytes)
        yield self._counter(
            "prefix_cache_loaded_tokens",
            "Tokens that were loaded from the host, and not computed.",
            tiers.loaded_tokens,
        )
        yield self._counter(
            "prefix_cache_recomputed_tokens",
            "Tokens that the host had, computed anew because that was quicker.",
            tiers.recomputed_tokens,
        )
        yield self._counters(
            "preemption_resumes",
            "Completions that came back after they had lost their blocks, by how.",
            "how",
            tiers.resumes,
        )
        yield self._counters(
            "kv_moved_bytes", "Bytes of blocks that were copied.", "way", tiers.moved_bytes
        )
        yield self._counters(
            "kv_moved_seconds", "Time that it took, beside steps.", "way", tiers.moved_seconds
        )
        yield self._counters(
            "kv_lost_blocks",
            "Blocks that the host or the disk lost, by why.",
            "reason",
            tiers.lost_blocks,
        )

    def _canary(self, canary: CanaryStats) -> Iterator[Metric]:
        yield self._counter(
            "canary_requests", "Requests scored again over the full cache.", canary.requests
        )
        yield self._mean(
            "canary_kl_nats",
            "KL divergence of the full cache's next token from the served one's.",
            canary.tokens,
            canary.kl_sum,
        )
        yield self._mean(
            "canary_top1_agreement",
            "1 where both caches find the same token most probable, else 0.",
            canary.tokens,
            canary.top1_agreed,
        )
        skipped = CounterMetricFamily(
            f"{PREFIX}canary_skipped",
            "Requests chosen to be scored again, and not scored.",
            labels=[MODEL_LABEL, "reason"],
        )
        for reason in get_args(CanarySkip):
            skipped.add_metric([self._model_name, reason], canary.skipped.get(reason, 0))
        yield skipped

    def _infos(self, info: EngineInfo) -> Iterator[Metric]:
        yield InfoMetricFamily(
            f"{PREFIX}build",
            "What runs here.",
            value={
                MODEL_LABEL: self._model_name,
                "version": version("headlong"),
                "model": info.model,
                "device": info.device,
                "dtype": info.dtype,
            },
        )
        groups = InfoMetricFamily(
            f"{PREFIX}head_group",
            "KV heads that share a policy, and what they keep.",
            labels=[MODEL_LABEL, "group"],
        )
        for group in info.groups:
            keeps = {
                "num_heads": str(group.num_heads),
                "sink_size": str(group.sink_size),
                "window_size": "all" if group.window_size is None else str(group.window_size),
            }
            groups.add_metric([self._model_name, group.name], keeps)
        yield groups
        ranks = InfoMetricFamily(
            f"{PREFIX}rank",
            "What each of the ranks that compute the model together has of it.",
            labels=[MODEL_LABEL, "rank"],
        )
        for number, rank in enumerate(info.ranks):
            has = {
                "device": rank.device,
                "num_heads": str(rank.num_heads),
                "num_retrieval_heads": str(rank.num_retrieval_heads),
                "kv_bytes": str(rank.kv_bytes),
            }
            ranks.add_metric([self._model_name, str(number)], has)
        yield ranks
        yield InfoMetricFamily(
            f"{PREFIX}cache_config",
            "How the KV cache was laid out.",
            value={
                MODEL_LABEL: self._model_name,
                "block_size": str(info.block_size),
                "max_model_len": str(info.max_model_len),
                "max_num_seqs": str(info.max_num_seqs),
                "num_blocks": str(sum(group.num_blocks for group in info.groups)),
                "full_token_bytes": str(info.full_token_bytes),
            },
        )

    def _engine_process(self) -> Iterator[Metric]:
        for family in () if self._process is None else self._process.collect():
            family.samples = [
                each._replace(labels={MODEL_LABEL: self._model_name}) for each in family.samples
            ]
            yield family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(PREFIX + name, text, labels=[MODEL_LABEL])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(PREFIX + name, text, labels=[MODEL_LABEL])
        family.add_metric([self._model_name], value)
        return family

    def _counters(
        self, name: str, text: str, label: str, values: Mapping[str, float]
    ) -> CounterMetricFamily:
        family = CounterMetricFamily(PREFIX + name, text, labels=[MODEL_LABEL, label])
        for each, value in values.items():
            family.add_metric([self._model_name, each], value)
        return family

    def _mean(self, name: str, text: str, count: int, total: float) -> SummaryMetricFamily:
        family = SummaryMetricFamily(PREFIX + name, text, labels=[MODEL_LABEL])
        family.add_metric([self._model_name], count, total)
        return family
