"""What the engine tells the operator at start."""

import os
from typing import Protocol

from headlong.cache.cache_shape import CacheShape
from headlong.cache.capacity import MemoryPlan
from headlong.cache.groups import STREAMING, HeadGroup
from headlong.cache.kv_cache import KVCache
from headlong.profiling.head_map import head_map_lines, head_summary
from headlong.server.engine.device import rank_device
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.head_dealing import HeadShare
from headlong.server.engine.head_plan import retrieval_labels
from headlong.server.engine.model import LoadedModel
from headlong.server.engine.rank_plan import local_arena
from headlong.server.engine.status import EngineInfo, GroupInfo, RankInfo
from headlong.server.engine.weights import dtype_name

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Described(Protocol):
    """What of an engine is told."""

    @property
    def config(self) -> EngineConfig:
        """What was loaded and how."""
        ...

    @property
    def model(self) -> LoadedModel:
        """The loaded model."""
        ...

    @property
    def attention_backend(self) -> str:
        """What computes attention."""
        ...

    @property
    def groups(self) -> tuple[HeadGroup, ...]:
        """Its head groups."""
        ...

    @property
    def plan(self) -> MemoryPlan:
        """What was sized."""
        ...

    @property
    def cache(self) -> KVCache:
        """Owner of all blocks."""
        ...

    @property
    def max_model_len(self) -> int:
        """Most tokens of a request."""
        ...

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether decodes run as CUDA graphs."""
        ...


def describe(engine: Described) -> list[str]:
    """Where it runs and what it saves; head map, a line a layer; memory plan; a full cache's."""
    labels = retrieval_labels(engine.groups, engine.model.geometry)
    return [
        _device_line(engine),
        *_feature_lines(engine.config, engine.plan.shape),
        f"head map: {head_summary(labels)}",
        *(f"  {line}" for line in head_map_lines(labels)),
        *_memory_lines(engine.plan, engine.max_model_len),
        *_rank_lines(rank_infos(engine)),
    ]


def engine_info(engine: Described) -> EngineInfo:
    """The same as data, for the HTTP part and for metrics."""
    model, shape = engine.model, engine.plan.shape
    places = {
        member: index for index, group in enumerate(engine.groups) for member in group.members
    }
    return EngineInfo(
        model=engine.config.model,
        max_model_len=engine.max_model_len,
        vocab_size=model.vocab_size,
        max_num_seqs=engine.config.max_num_seqs,
        block_size=shape.block_size,
        eos_token_ids=tuple(sorted(model.eos_token_ids)),
        default_sampling=dict(model.default_sampling),
        head_groups=tuple(
            tuple(places[layer, head] for head in range(model.geometry.num_kv_heads))
            for layer in range(model.geometry.num_layers)
        ),
        groups=tuple(
            GroupInfo(
                name=group.name,
                sink_size=group.policy.sink_size,
                window_size=None if group.policy.keeps_all else group.policy.window_size,
                num_heads=len(group.members),
                num_blocks=num_blocks,
                block_bytes=shape.block_bytes(group),
            )
            for group, num_blocks in zip(engine.groups, engine.plan.num_blocks, strict=True)
        ),
        full_token_bytes=shape.full_token_bytes,
        kv_bytes=engine.plan.arena_bytes if engine.plan.num_slabs else 0,
        device=str(model.device),
        dtype=dtype_name(model.dtype),
        lines=tuple(describe(engine)),
        ranks=tuple(rank_infos(engine)),
        pid=os.getpid(),
    )


def rank_infos(engine: Described) -> list[RankInfo]:
    """What each rank has of the model."""
    model = engine.model
    shares: list[HeadShare | None] = [None]
    if model.share is not None:
        dealing = model.share.dealing
        shares = [HeadShare(dealing, rank) for rank in range(dealing.num_ranks)]
    found: list[RankInfo] = []
    for rank, share in enumerate(shares):
        local = local_arena(engine.cache.layout, engine.groups, share)
        pages = dict(zip(local.groups, local.layout.group_pages, strict=True))
        found.append(
            RankInfo(
                device=str(model.device) if share is None else str(rank_device(model.device, rank)),
                num_heads=sum(pages.values()),
                num_retrieval_heads=sum(
                    count for group, count in pages.items() if engine.groups[group].policy.keeps_all
                ),
                kv_bytes=local.layout.total_bytes,
            )
        )
    return found


def _rank_lines(ranks: list[RankInfo]) -> list[str]:
    if len(ranks) == 1:
        return []
    return [
        f"ranks: {len(ranks)}, which compute together",
        *(
            f"  rank {number:<3} {rank.device:<8} {rank.num_retrieval_heads:>5} of "
            f"{rank.num_heads} KV heads retrieve  {format_bytes(rank.kv_bytes):>10} of KV cache"
            for number, rank in enumerate(ranks)
        ),
    ]


def _device_line(engine: Described) -> str:
    model = engine.model
    weights, cache = dtype_name(model.dtype), dtype_name(model.geometry.kv_dtype)
    held = weights if weights == cache else f"weights in {weights} and KV cache in {cache}"
    graphs = "on" if engine.uses_cuda_graphs else "off"
    return (
        f"device: {model.device}, {held}, attention by {engine.attention_backend}, "
        f"CUDA graphs {graphs}"
    )


def _feature_lines(config: EngineConfig, shape: CacheShape) -> list[str]:
    """What of K and V is stored or read in less than full, or kept elsewhere; a line each."""
    lines: list[str] = []
    kinds = tuple(dict.fromkeys(group.kind for group in shape.groups))
    if any(kind in shape.formats for kind in kinds):
        own = dtype_name(shape.dtype)
        named = (
            f"{kind} in {shape.formats[kind].name if kind in shape.formats else own}"
            for kind in kinds
        )
        lines.append(f"KV cache format: {', '.join(named)}")
    if shape.compensated and STREAMING in kinds:
        lines.append(
            f"compensation: from layer {shape.compensated_from} on, streaming heads keep one entry "
            "for all tokens that they drop"
        )
    if config.retrieval_budget is not None:
        steps = config.selection_reuse_steps
        chosen = "for each token" if steps == 1 else f"for {steps} tokens at once"
        if config.selection_min_similarity is not None:
            chosen += (
                f", anew where the query's cosine is below {config.selection_min_similarity:g}"
            )
        lines.append(
            f"page selection: a generated token reads at most {config.retrieval_budget} tokens in "
            f"a retrieval head, chosen {chosen}"
        )
    if config.host_cache_bytes:
        more = f"host cache: {format_bytes(config.host_cache_bytes)} for blocks beyond the KV cache"
        if config.disk_cache_dir is not None:
            most = format_bytes(config.disk_cache_bytes)
            more += f", then files in {config.disk_cache_dir}, {most} at most"
        lines.append(more)
    return lines


def _memory_lines(plan: MemoryPlan, max_model_len: int) -> list[str]:
    shape = plan.shape
    lines = [f"memory plan: {format_bytes(plan.arena_bytes)} of KV cache, all allocated"]
    for group, blocks in zip(shape.groups, plan.num_blocks, strict=True):
        policy = group.policy
        token_bytes = shape.block_bytes(group) // shape.block_size
        keeps = (
            "every token"
            if policy.keeps_all
            else f"sink {policy.sink_size} + window {policy.window_size} tokens"
        )
        share = (
            f"up to {blocks:>8} blocks of {shape.block_size}"
            if plan.num_slabs
            else f"{blocks:>8} blocks of {shape.block_size}  "
            f"{format_bytes(blocks * shape.block_bytes(group)):>10}"
        )
        lines.append(
            f"  {group.name:<14} {len(group.members):>5} heads  {keeps:<34} "
            f"{token_bytes:>8} B/token  {share}"
        )
    if plan.num_slabs:
        lines.append(
            f"  they share all of it, in {plan.num_slabs} slabs of {format_bytes(plan.slab_bytes)}"
        )
    if shape.wide_tokens and any(group.name == STREAMING for group in shape.groups):
        lines.append(
            f"  {shape.wide_tokens} tokens of {STREAMING} are set aside for requests with a wider "
            "kv_policy"
        )
    own, full = plan.sequence_bytes(max_model_len), plan.full_sequence_bytes(max_model_len)
    held = "any number of" if plan.cache_tokens is None else f"{plan.cache_tokens}"
    return [
        *lines,
        f"  a sequence takes {format_bytes(shape.constant_sequence_bytes)} of windows and sinks "
        f"and {shape.growing_token_bytes} B for each token of context",
        f"  holds {held} tokens of context in all, {max_model_len} in one sequence",
        f"  one sequence of {max_model_len} tokens takes {format_bytes(own)}; "
        f"a full cache would need {format_bytes(full)} ({full / own:.2f} times as much) "
        f"and hold {plan.full_cache_tokens} tokens in all",
    ]


def format_bytes(count: int) -> str:
    """A byte count for people: "1.50 GiB"."""
    value = float(count)
    for unit in _UNITS[:-1]:
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} {_UNITS[-1]}"
