"""What the engine says of itself: once what it is, and after every step how it does."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from headlong.cache.tier_figures import Loss, Way

CanarySkip = Literal["full_already", "busy", "no_room", "out_of_memory", "interrupted"]
"""Why a finished request that was chosen is not scored: it kept everything, others wait, blocks or
memory do not suffice, or requests came too often."""

Resume = Literal["swapped_in", "recomputed"]
"""How a sequence that had lost its blocks came back: some were loaded from the host, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupInfo:
    """One head group and its part of the arena.

    Attributes:
        name: "retrieval", "streaming", or "sliding-4096".
        sink_size: First tokens that its heads keep.
        window_size: Recent tokens that its heads keep; None keeps all.
        num_heads: KV heads of all layers in it.
        num_blocks: Its blocks; where groups share the arena, the most that it can have.
        block_bytes: Bytes of one.
    """

    name: str
    sink_size: int
    window_size: int | None
    num_heads: int
    num_blocks: int
    block_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """What one of the ranks that compute a model together has of it.

    Attributes:
        device: Where it computes.
        num_heads: KV heads of all layers that it computes.
        num_retrieval_heads: Of these, heads that keep everything.
        kv_bytes: Its part of the KV cache.
    """

    device: str
    num_heads: int
    num_retrieval_heads: int
    kv_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What does not change after the start.

    Attributes:
        model: Folder or hub id.
        max_model_len: Most tokens of prompt and completion of a request.
        vocab_size: Token ids are 0 to this less one.
        max_num_seqs: Most completions that run at once.
        block_size: Tokens of a block.
        eos_token_ids: Tokens that end a completion.
        default_sampling: What the model's generation_config asks for, by SamplingParams field.
        head_groups: [num_layers][num_kv_heads], index into `groups`.
        groups: The head groups.
        full_token_bytes: Bytes of one token in a cache that keeps everything for every head.
        kv_bytes: Bytes of the arena; 0 if that is all the groups' blocks.
        device: Where it runs.
        dtype: Of the weights.
        lines: The same for the operator to read.
        ranks: What each rank has; one if the model runs on one device.
        pid: The process that it runs in; None if that is on another machine.
    """

    model: str
    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    block_size: int
    eos_token_ids: tuple[int, ...]
    default_sampling: Mapping[str, float | int]
    head_groups: tuple[tuple[int, ...], ...]
    groups: tuple[GroupInfo, ...]
    full_token_bytes: int
    device: str
    dtype: str
    lines: tuple[str, ...]
    ranks: tuple[RankInfo, ...] = ()
    kv_bytes: int = 0
    pid: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryStats:
    """What compression costs on finished requests that were scored again over the full cache.

    Counters since the start.

    Attributes:
        requests: Requests scored.
        tokens: Their completion tokens.
        kl_sum: Sum over these tokens of KL(full || served), in nats.
        top1_agreed: Tokens whose most probable candidate is the same.
        skipped: Requests chosen but not scored, by `CanarySkip`.
    """

    requests: int = 0
    tokens: int = 0
    kl_sum: float = 0.0
    top1_agreed: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """What the cache keeps beyond the arena. The two sizes apart, counters since the start.

    Attributes:
        host_bytes: Bytes of blocks in the host's memory.
        disk_bytes: Bytes of blocks in files.
        loaded_tokens: Tokens that were loaded from the host, and not computed.
        recomputed_tokens: Tokens that the host had, computed anew because that was quicker.
        resumes: Sequences that came back after a preemption, by `Resume`.
        moved_bytes: Bytes copied, by `Way`.
        moved_seconds: Time that it took, beside steps, by `Way`.
        lost_blocks: Blocks that were lost, by `Loss`.
    """

    host_bytes: int = 0
    disk_bytes: int = 0
    loaded_tokens: int = 0
    recomputed_tokens: int = 0
    resumes: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(get_args(Resume), 0))
    moved_bytes: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(get_args(Way), 0))
    moved_seconds: Mapping[str, float] = field(
        default_factory=lambda: dict.fromkeys(get_args(Way), 0.0)
    )
    lost_blocks: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(get_args(Loss), 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """How the engine does. Names that end in `_total` only grow.

    Attributes:
        steps_total: Steps run; progress is seen by this.
        num_running: Completions that own blocks.
        num_waiting: Completions in the queue.
        owned_blocks: Of each group, blocks that running sequences own.
        cached_blocks: Of each group, blocks without an owner that can still be found.
        free_blocks: Of each group, blocks that it could take beside these if no other took any;
            none are listed where that is all its others.
        kv_bytes_owned: Bytes of all owned blocks.
        kv_bytes_full: What a cache that keeps everything would hold for the same sequences.
        prompt_tokens_total: Prompt tokens computed or found in the prefix cache.
        generation_tokens_total: Tokens sampled.
        preemptions_total: Times that blocks were taken from a running sequence.
        prefix_queries_total: Prompt tokens looked up in the prefix cache.
        prefix_hits_total: Of these, tokens found.
        prefix_misses_total: The others, by reason.
        step_prefill_tokens: Prompt tokens of the last step.
        step_decode_tokens: Decodes of the last step.
        step_s: Seconds that the last step took.
        step_s_total: Seconds in steps.
        model_s_total: Of these, seconds in the model's pass and in sampling.
        canary: What compression costs.
        tiers: What the cache keeps beyond the arena.
    """

    steps_total: int = 0
    num_running: int = 0
    num_waiting: int = 0
    owned_blocks: tuple[int, ...] = ()
    cached_blocks: tuple[int, ...] = ()
    free_blocks: tuple[int, ...] = ()
    kv_bytes_owned: int = 0
    kv_bytes_full: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    preemptions_total: int = 0
    prefix_queries_total: int = 0
    prefix_hits_total: int = 0
    prefix_misses_total: Mapping[str, int] = field(default_factory=dict)
    step_prefill_tokens: int = 0
    step_decode_tokens: int = 0
    step_s: float = 0.0
    step_s_total: float = 0.0
    model_s_total: float = 0.0
    canary: CanaryStats = field(default_factory=CanaryStats)
    tiers: TierStats = field(default_factory=TierStats)


@dataclass(frozen=True, slots=True)
class GroupBlocks:
    """What a group's blocks are at some time.

    Attributes:
        owned: Of running sequences.
        cached: Without an owner, but still to be found.
        free: That it could take beside these.
    """

    owned: int
    cached: int
    free: int

    @property
    def usage(self) -> float:
        """Fraction of what it has and could have that is owned, 0 to 1."""
        return self.owned / max(self.owned + self.cached + self.free, 1)


def group_blocks(info: EngineInfo, stats: EngineStats) -> list[GroupBlocks]:
    """The blocks of each group; before an engine's first report all are free."""
    none = (0,) * len(info.groups)
    owned_blocks, cached_blocks = stats.owned_blocks or none, stats.cached_blocks or none
    others = tuple(
        group.num_blocks - owned - cached
        for group, owned, cached in zip(info.groups, owned_blocks, cached_blocks, strict=True)
    )
    states = zip(owned_blocks, cached_blocks, stats.free_blocks or others, strict=True)
    return [GroupBlocks(*each) for each in states]
