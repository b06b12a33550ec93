"""Body of ``GET /status``."""

from typing import Literal

from headlong.server.api.schemas_common import ResponseModel


class HeadGroupStatus(ResponseModel):
    """One head group and its share of the cache.

    Attributes:
        name: "retrieval", "streaming", or "sliding-4096".
        sink_size: First tokens that its heads keep.
        window_size: Recent tokens that its heads keep; null keeps all.
        num_heads: KV heads of all layers in it.
        num_blocks: All its blocks.
        owned_blocks: Of these, held by running requests.
        cached_blocks: Without an owner, and still to be found by their prefix.
        free_blocks: Neither.
        block_bytes: Bytes of one.
    """

    name: str
    sink_size: int
    window_size: int | None
    num_heads: int
    num_blocks: int
    owned_blocks: int
    cached_blocks: int
    free_blocks: int
    block_bytes: int


class ThroughputStatus(ResponseModel):
    """Tokens, per second over the last ten seconds and in all."""

    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    prompt_tokens_total: int
    generation_tokens_total: int


class LatencyStatus(ResponseModel):
    """Times of the last minute; null without any.

    Attributes:
        num_first_tokens: Completions that TTFT is about.
        ttft_p50_s: Median time from a request's arrival to its first token.
        ttft_p90_s: Nine in ten were at most this.
        itl_p50_s: Median time between two tokens of a completion.
    """

    num_first_tokens: int
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    itl_p50_s: float | None


class PrefixCacheStatus(ResponseModel):
    """Prompt tokens that were looked up, since the start.

    Attributes:
        queries_total: Tokens looked up.
        hits_total: Of these, tokens found.
        hit_rate: Their share; null before the first lookup.
        misses_total: The others, by reason.
    """

    queries_total: int
    hits_total: int
    hit_rate: float | None
    misses_total: dict[str, int]


class KVCacheStatus(ResponseModel):
    """What running requests hold.

    Attributes:
        owned_bytes: Bytes of their blocks.
        full_bytes: What a cache that keeps everything for every head would hold for them.
        saved_bytes: The difference. Below zero while requests are so short that the empty places
            of their last blocks outweigh it.
    """

    owned_bytes: int
    full_bytes: int
    saved_bytes: int


class CanaryStatus(ResponseModel):
    """What compression costs: finished requests, scored again over the full cache.

    Attributes:
        requests: Requests scored since the start.
        tokens: Their completion tokens.
        mean_kl: Mean over the tokens of KL(full || served), in nats; null without any.
        top1_agreement: Share of the tokens whose most probable candidate is the same.
        skipped: Requests that were chosen and not scored, by reason.
    """

    requests: int
    tokens: int
    mean_kl: float | None
    top1_agreement: float | None
    skipped: dict[str, int]


class TierStatus(ResponseModel):
    """What the cache keeps beyond the KV cache's own memory.

    Attributes:
        host_bytes: Bytes of blocks in the host's memory.
        disk_bytes: Bytes of blocks in files.
        loaded_tokens_total: Tokens that were loaded, and not computed.
        recomputed_tokens_total: Tokens that the host had, computed anew because that was quicker.
        resumes_total: Requests that came back after a preemption, by how.
        lost_blocks_total: Blocks that were lost, by reason.
    """

    host_bytes: int
    disk_bytes: int
    loaded_tokens_total: int
    recomputed_tokens_total: int
    resumes_total: dict[str, int]
    lost_blocks_total: dict[str, int]


class Status(ResponseModel):
    """The server at one moment, for people; `/metrics` has the same for monitoring.

    Attributes:
        models: All names of the model.
        version: Headlong's.
        state: Whether requests are taken: only when "ready".
        uptime_s: Seconds since the start.
        device: Where the model runs.
        dtype: Of its weights.
        has_chat_template: Whether conversations can be rendered.
        max_model_len: Most tokens of prompt and completion of a request.
        max_num_seqs: Most completions that run at once.
        block_size: Tokens of a block.
        head_groups: A row for each layer, an index into `groups` for each KV head.
        groups: The head groups.
        running: Completions that own blocks.
        waiting: Completions in the queue.
        steps_total: Steps of the engine.
        preemptions_total: Times that blocks were taken from a running request.
    """

    models: list[str]
    version: str
    state: Literal["starting", "ready", "draining", "dead"]
    uptime_s: int
    device: str
    dtype: str
    has_chat_template: bool
    max_model_len: int
    max_num_seqs: int
    block_size: int
    head_groups: list[list[int]]
    groups: list[HeadGroupStatus]
    running: int
    waiting: int
    steps_total: int
    preemptions_total: int
    throughput: ThroughputStatus
    latency: LatencyStatus
    prefix_cache: PrefixCacheStatus
    kv_cache: KVCacheStatus
    tiers: TierStatus
    canary: CanaryStatus
