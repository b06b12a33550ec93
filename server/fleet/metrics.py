"""How each replica does, as metrics beside those of all together."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headlong.server.engine.status import EngineInfo, EngineStats, group_blocks
from headlong.server.fleet.link import RayLink
from headlong.server.telemetry.engine_metrics import MODEL_LABEL, PREFIX

REPLICA_LABEL = "replica"


@dataclass(frozen=True, slots=True)
class _Series:
    family: type[CounterMetricFamily | GaugeMetricFamily]
    name: str
    text: str
    value: Callable[[EngineStats], float]


_SERIES = (
    _Series(
        GaugeMetricFamily,
        "replica_num_requests_running",
        "Completions that own blocks, of one replica.",
        lambda stats: stats.num_running,
    ),
    _Series(
        GaugeMetricFamily,
        "replica_num_requests_waiting",
        "Completions in the queue, of one replica.",
        lambda stats: stats.num_waiting,
    ),
    _Series(
        CounterMetricFamily,
        "replica_num_preemptions",
        "Times that blocks were taken from a running sequence, of one replica.",
        lambda stats: stats.preemptions_total,
    ),
    _Series(
        CounterMetricFamily,
        "replica_prompt_tokens",
        "Prompt tokens computed or found in the prefix cache, of one replica.",
        lambda stats: stats.prompt_tokens_total,
    ),
    _Series(
        CounterMetricFamily,
        "replica_generation_tokens",
        "Tokens sampled, of one replica.",
        lambda stats: stats.generation_tokens_total,
    ),
    _Series(
        CounterMetricFamily,
        "replica_prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache, of one replica.",
        lambda stats: stats.prefix_queries_total,
    ),
    _Series(
        CounterMetricFamily,
        "replica_prefix_cache_hits",
        "Of these, tokens found, of one replica.",
        lambda stats: stats.prefix_hits_total,
    ),
    _Series(
        CounterMetricFamily,
        "replica_engine_step_seconds",
        "Time spent in steps, of one replica.",
        lambda stats: stats.step_s_total,
    ),
)


class ReplicaCollector(Collector):
    """Reads the latest stats of each replica; one that is gone has no series.

    Args:
        link: To the replicas.
        model_name: The label of all series.
    """

    def __init__(self, link: RayLink, model_name: str) -> None:
        self._link = link
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        """Makes the metrics of this moment."""
        replicas = self._link.replicas
        count = GaugeMetricFamily(
            f"{PREFIX}num_replicas", "Replicas that answer.", labels=[MODEL_LABEL]
        )
        count.add_metric([self._model_name], len(replicas))
        yield count
        labels = [MODEL_LABEL, REPLICA_LABEL]
        for series in _SERIES:
            family = series.family(PREFIX + series.name, series.text, labels=labels)
            for replica, stats in replicas.items():
                family.add_metric([self._model_name, replica], series.value(stats))
            yield family
        yield self._usage(self._link.one, replicas)

    def describe(self) -> list[Metric]:
        """Names nothing beforehand: no other collector has names like these."""
        return []

    def _usage(self, info: EngineInfo, replicas: Mapping[str, EngineStats]) -> Metric:
        family = GaugeMetricFamily(
            f"{PREFIX}replica_kv_cache_usage_perc",
            "Fraction of the fullest head group's blocks that running sequences own, of one "
            "replica, 0 to 1.",
            labels=[MODEL_LABEL, REPLICA_LABEL],
        )
        for replica, stats in replicas.items():
            used = (blocks.usage for blocks in group_blocks(info, stats))
            family.add_metric([self._model_name, replica], max(used, default=0.0))
        return family
