"""``GET /status``."""

import time
from importlib.metadata import version

from fastapi import APIRouter

from headlong.server.api.schemas_status import (
    CanaryStatus,
    HeadGroupStatus,
    KVCacheStatus,
    LatencyStatus,
    PrefixCacheStatus,
    Status,
    ThroughputStatus,
    TierStatus,
)
from headlong.server.api.serving import Serving
from headlong.server.api.usage import hide_salts
from headlong.server.engine.status import (
    CanaryStats,
    EngineInfo,
    EngineStats,
    TierStats,
    group_blocks,
)
from headlong.server.http_errors import error_docs
from headlong.server.telemetry.recent import RecentFigures


def status_router(serving: Serving, recent: RecentFigures) -> APIRouter:
    """Makes the endpoint that shows the server at one moment.

    Args:
        serving: What is served.
        recent: Observes the same engine.
    """
    router = APIRouter()

    @router.get("/status", responses=error_docs(401, 500))
    async def status() -> Status:
        """Tells how the engine does, also when it takes no requests."""
        engine = serving.engine
        info, stats = engine.info, engine.stats
        return Status(
            models=list(serving.model_names),
            version=version("headlong"),
            state=engine.state,
            uptime_s=max(0, int(time.time() - serving.created)),
            device=info.device,
            dtype=info.dtype,
            has_chat_template=serving.prompts.template.exists,
            max_model_len=info.max_model_len,
            max_num_seqs=info.max_num_seqs,
            block_size=info.block_size,
            head_groups=[list(layer) for layer in info.head_groups],
            groups=_groups(info, stats),
            running=stats.num_running,
            waiting=stats.num_waiting,
            steps_total=stats.steps_total,
            preemptions_total=stats.preemptions_total,
            throughput=_throughput(stats, recent),
            latency=_latency(recent),
            prefix_cache=_prefix_cache(stats),
            kv_cache=KVCacheStatus(
                owned_bytes=stats.kv_bytes_owned,
                full_bytes=stats.kv_bytes_full,
                saved_bytes=stats.kv_bytes_full - stats.kv_bytes_owned,
            ),
            tiers=_tiers(stats.tiers),
            canary=_canary(stats.canary),
        )

    return router


def _groups(info: EngineInfo, stats: EngineStats) -> list[HeadGroupStatus]:
    return [
        HeadGroupStatus(
            name=group.name,
            sink_size=group.sink_size,
            window_size=group.window_size,
            num_heads=group.num_heads,
            num_blocks=group.num_blocks,
            owned_blocks=blocks.owned,
            cached_blocks=blocks.cached,
            free_blocks=blocks.free,
            block_bytes=group.block_bytes,
        )
        for group, blocks in zip(info.groups, group_blocks(info, stats), strict=True)
    ]


def _throughput(stats: EngineStats, recent: RecentFigures) -> ThroughputStatus:
    rates = recent.rates()
    return ThroughputStatus(
        prompt_tokens_per_s=rates.prompt_tokens,
        generation_tokens_per_s=rates.generation_tokens,
        prompt_tokens_total=stats.prompt_tokens_total,
        generation_tokens_total=stats.generation_tokens_total,
    )


def _latency(recent: RecentFigures) -> LatencyStatus:
    latencies = recent.latencies()
    return LatencyStatus(
        num_first_tokens=latencies.num_first_tokens,
        ttft_p50_s=latencies.ttft_p50_s,
        ttft_p90_s=latencies.ttft_p90_s,
        itl_p50_s=latencies.itl_p50_s,
    )


def _prefix_cache(stats: EngineStats) -> PrefixCacheStatus:
    queries, hits = stats.prefix_queries_total, stats.prefix_hits_total
    return PrefixCacheStatus(
        queries_total=queries,
        hits_total=hits,
        hit_rate=hits / queries if queries else None,
        # One tenant could watch here whether another has its prompt.
        misses_total=hide_salts(stats.prefix_misses_total),
    )


def _tiers(stats: TierStats) -> TierStatus:
    return TierStatus(
        host_bytes=stats.host_bytes,
        disk_bytes=stats.disk_bytes,
        loaded_tokens_total=stats.loaded_tokens,
        recomputed_tokens_total=stats.recomputed_tokens,
        resumes_total=dict(stats.resumes),
        lost_blocks_total=dict(stats.lost_blocks),
    )


def _canary(stats: CanaryStats) -> CanaryStatus:
    tokens = stats.tokens
    return CanaryStatus(
        requests=stats.requests,
        tokens=tokens,
        mean_kl=stats.kl_sum / tokens if tokens else None,
        top1_agreement=stats.top1_agreed / tokens if tokens else None,
        skipped=dict(stats.skipped),
    )
