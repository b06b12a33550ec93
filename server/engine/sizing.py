"""What a model will take on a GPU, and what that GPU will hold of it, before either is there.

The arithmetic is the engine's own: the shapes are probed as at load, the largest step is run as at
start, and `plan_memory` shares out what is left. What the engine measures on a CUDA device is
computed here, from tensors that have no memory.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from headlong.cache.cache_shape import CacheShape
from headlong.cache.capacity import CapacityError, MemoryPlan, plan_memory
from headlong.cache.groups import STREAMING, HeadGroup, build_head_groups
from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.kernels.batch import UNBOUNDED
from headlong.kernels.layout import PageLayout
from headlong.profiling.head_profile import (
    DEFAULT_SINK_SIZE,
    DEFAULT_WINDOW_SIZE,
    num_streaming_heads,
)
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.gpus import LEAST_CAPABILITY, Gpu
from headlong.server.engine.head_plan import check_compensation, plan_heads
from headlong.server.engine.live_bytes import peak_bytes
from headlong.server.engine.memory import (
    DeviceMemory,
    cache_shape,
    choices_bytes,
    longest_wanted,
    run_largest_step,
    sampling_bytes,
    utilization_of,
)
from headlong.server.engine.meta_model import meta_model
from headlong.server.engine.model import ModelGeometry, ProbedModel
from headlong.server.engine.scheduler import SCORED_TOKENS
from headlong.server.engine.weight_bytes import num_parameters, weights_bytes
from headlong.server.engine.weight_quantisation import Processor
from headlong.server.errors import ConfigError

CUDA_CONTEXT_BYTES = 512 << 20
"""What CUDA, cuBLAS and the kernels' code take of a device beside tensors: an allowance."""

DEFAULT_LENGTHS = (8 << 10, 32 << 10, 128 << 10, 1 << 20)
MAX_LENGTH = 1 << 30


@dataclass(frozen=True, slots=True)
class EvenHeads:
    """Labels without a profile: streaming heads dealt to the layers as evenly as they go.

    Attributes:
        sparsity: Fraction of KV heads that stream, 0 to 1.
        sink_size: Tokens that they keep of a sequence's start.
        window_size: Tokens that they keep of its end.

    Raises:
        ConfigError: A value is out of range; `param` names it.
    """

    sparsity: float
    sink_size: int = DEFAULT_SINK_SIZE
    window_size: int = DEFAULT_WINDOW_SIZE

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity <= 1.0:
            raise ConfigError(f"sparsity must be in 0 to 1, got {self.sparsity}", "sparsity")
        if not 0 <= self.sink_size < UNBOUNDED:
            raise ConfigError(
                f"sink_size must be in 0 to {UNBOUNDED - 1}, got {self.sink_size}", "sink_size"
            )
        if not 1 <= self.window_size <= UNBOUNDED:
            raise ConfigError(
                f"window_size must be in 1 to {UNBOUNDED}, got {self.window_size}", "window_size"
            )

    def groups(self, geometry: ModelGeometry) -> tuple[HeadGroup, ...]:
        """The head groups of a model; as many heads stream as with a profile of this sparsity."""
        layers, heads = geometry.num_layers, geometry.num_kv_heads
        streaming = num_streaming_heads(layers * heads, self.sparsity)
        labels = []
        for layer in range(layers):
            here = (layer + 1) * streaming // layers - layer * streaming // layers
            labels.append([head >= here for head in range(heads)])
        policy = HeadPolicy(self.sink_size, self.window_size)
        return build_head_groups(labels, policy, geometry.native_windows)


@dataclass(frozen=True, slots=True, kw_only=True)
class SizingRequest:
    """What to plan for.

    Attributes:
        config: The engine's settings; `model` may be a configuration file.
        gpu: The GPU; None where `config.kv_cache_memory_bytes` says what the cache may take.
        even: Labels where there is no profile; None keeps every head's full cache.
        lengths: Lengths in tokens for which sequences are counted.

    Raises:
        ConfigError: A value is out of range, or neither or both of GPU and cache bytes are given.
    """

    config: EngineConfig
    gpu: Gpu | None = None
    even: EvenHeads | None = None
    lengths: tuple[int, ...] = DEFAULT_LENGTHS

    def __post_init__(self) -> None:
        if (self.gpu is None) == (self.config.kv_cache_memory_bytes is None):
            raise ConfigError("either gpu or kv_cache_memory_bytes must be given", "gpu")
        if self.even is not None:
            check_compensation(self.config, self.even.window_size)
        if not self.lengths or not all(0 < each <= MAX_LENGTH for each in self.lengths):
            raise ConfigError(f"lengths must each be in 1 to {MAX_LENGTH} tokens", "lengths")

    @property
    def processor(self) -> Processor:
        """The GPU that is to compute the model; if it has no name, the least that is served."""
        known = None if self.gpu is None else self.gpu.capability
        return Processor("cuda", known or LEAST_CAPABILITY)


@dataclass(frozen=True, slots=True)
class CacheSizing:
    """What one way of labelling the heads takes and holds. Bytes and tokens.

    Attributes:
        shape: Groups, pages and bounds.
        plan: What the whole memory holds, however long the model's own context.
        sequences: By length, the most sequences of this length that can run at once, if
            `max_num_seqs` is set to that number.
    """

    shape: CacheShape
    plan: MemoryPlan
    sequences: dict[int, int]

    @property
    def max_context_tokens(self) -> int | None:
        """Longest sequence that the memory holds alone; None if no group grows."""
        return None if self.cache_tokens is None else self.plan.max_sequence_tokens

    @property
    def cache_tokens(self) -> int | None:
        """Tokens of all sequences together; None if no group grows."""
        return self.plan.cache_tokens


@dataclass(frozen=True, slots=True)
class Sizing:
    """A plan of what a model takes, and of what the rest of the memory holds.

    Attributes:
        request: What was asked.
        model: The model, without weights.
        num_parameters: Elements of its weights.
        weights_bytes: Parameters and buffers.
        activation_bytes: Most that the tensors of the largest step take, attention's aside.
        memory: How the GPU is shared; None where the cache's bytes were given.
        cache_bytes: What the cache may take.
        arena_bytes: What the engine would allocate: less than `cache_bytes` only where all the
            sequences that may run could not fill it.
        own: With the head labels that were asked for.
        full_cache: If every head of every layer kept every token, in the format that it has.
        no_profile: Without labels, where that is not the full cache: layers of the model's own
            keep their windows then. None elsewhere.
    """

    request: SizingRequest
    model: ProbedModel
    num_parameters: int
    weights_bytes: int
    activation_bytes: int
    memory: DeviceMemory | None
    cache_bytes: int
    arena_bytes: int
    own: CacheSizing
    full_cache: CacheSizing
    no_profile: CacheSizing | None

    @property
    def longest_served(self) -> int:
        """Longest sequence that the engine is to serve, if the memory holds it."""
        return longest_wanted(self.request.config, self.model)

    @property
    def utilization(self) -> float:
        """Fraction of the GPU's memory that may be taken."""
        return utilization_of(self.request.config)


def size_model(request: SizingRequest) -> Sizing:
    """Plan a model's memory.

    Args:
        request: What to plan for.

    Raises:
        ConfigError: The configuration or the profile cannot be used, the engine cannot run the
            model, or the memory holds no sequence.
    """
    config = request.config
    model = meta_model(config, request.processor)
    weights = weights_bytes(model.module)
    activation = _activations(model, config)
    geometry = model.geometry
    groups = plan_heads(config, model) if request.even is None else request.even.groups(geometry)

    def memory_of(max_num_seqs: int) -> DeviceMemory | None:
        if request.gpu is None:
            return None
        # Fewer sequences leave the engine's own setting, and what it takes, as they are.
        num_seqs = max(max_num_seqs, config.max_num_seqs)
        return DeviceMemory(
            total_bytes=request.gpu.total_bytes,
            used_bytes=weights + CUDA_CONTEXT_BYTES,
            activation_bytes=activation(num_seqs),
            sampling_bytes=sampling_bytes(num_seqs, model.vocab_size),
            choices_bytes=choices_bytes(replace(config, max_num_seqs=num_seqs), model, groups),
        )

    utilization = utilization_of(config)

    def budget(max_num_seqs: int) -> int:
        memory = memory_of(max_num_seqs)
        return (
            config.kv_cache_memory_bytes or 0 if memory is None else memory.cache_bytes(utilization)
        )

    shape = cache_shape(config, geometry, groups)
    memory = memory_of(config.max_num_seqs)
    try:
        own = _size_cache(shape, budget, request.lengths)
        longest = longest_wanted(config, model)
        at_start, _ = plan_memory(shape, budget(config.max_num_seqs), longest)
    except CapacityError as error:
        told = "" if memory is None else f" ({memory.explain(utilization)})"
        param = "kv_cache_memory_bytes" if memory is None else "gpu"
        raise ConfigError(f"{error}{told}", param) from error
    full = replace(shape, compensated=False)
    everything = _merged(full, [replace(group, policy=RETRIEVAL) for group in groups])
    unlabelled = _merged(
        full,
        [
            replace(group, policy=RETRIEVAL) if group.name == STREAMING else group
            for group in groups
        ],
    )

    def other(groups: tuple[HeadGroup, ...]) -> CacheSizing:
        # A block of every head is the least that any labels need, so this fits where they do.
        return _size_cache(replace(full, groups=groups), budget, request.lengths)

    return Sizing(
        request=request,
        model=model,
        num_parameters=num_parameters(model.module),
        weights_bytes=weights,
        activation_bytes=activation(config.max_num_seqs),
        memory=memory,
        cache_bytes=budget(config.max_num_seqs),
        arena_bytes=at_start.arena_bytes,
        own=own,
        full_cache=other(everything),
        no_profile=other(unlabelled) if unlabelled not in (groups, everything) else None,
    )


def _activations(model: ProbedModel, config: EngineConfig) -> Callable[[int], int]:
    """What the largest step takes, by the most sequences that run at once.

    More sequences are more rows of logits: the peak is the largest of some amounts that each grow
    linearly, so between two runs it is never above the line through them.
    """
    num_tokens, fewest = config.max_num_batched_tokens, config.max_num_seqs
    least, most = (
        peak_bytes(partial(run_largest_step, model, num_tokens, each))
        for each in (fewest, num_tokens)
    )
    # From here on every token of a step has its logits.
    end = num_tokens - SCORED_TOKENS

    def bound(max_num_seqs: int) -> int:
        if max_num_seqs <= fewest or least == most:
            return least
        part = min(1.0, (max_num_seqs - fewest) / (end - fewest))
        return least + round(part * (most - least))

    return bound


def _merged(shape: CacheShape, groups: Iterable[HeadGroup]) -> tuple[HeadGroup, ...]:
    """Makes one group of those that keep the same tokens in the same pages."""
    merged: dict[tuple[HeadPolicy, PageLayout], HeadGroup] = {}
    for group in groups:
        key = (group.policy, shape.page(group))
        members = merged[key].members if key in merged else ()
        first = merged.setdefault(key, group)
        merged[key] = replace(first, members=tuple(sorted({*members, *group.members})))
    return tuple(merged.values())


def _size_cache(
    shape: CacheShape, budget: Callable[[int], int], lengths: tuple[int, ...]
) -> CacheSizing:
    """Size a cache, whatever context the model was made for.

    Raises:
        CapacityError: Not even one sequence fits.
    """
    plan, _ = plan_memory(shape, budget(shape.max_num_seqs), UNBOUNDED)
    return CacheSizing(
        shape, plan, {each: _most_sequences(shape, budget, each) for each in lengths}
    )


def _most_sequences(shape: CacheShape, budget: Callable[[int], int], num_tokens: int) -> int:
    """The most sequences of a length that run at once, each in a step of its own token."""

    def holds(num_seqs: int) -> bool:
        asked = replace(shape, max_num_seqs=num_seqs)
        try:
            plan, _ = plan_memory(asked, budget(num_seqs), num_tokens)
        except CapacityError:
            return False
        return plan.holds(num_seqs, num_tokens)

    held, too_many = 0, shape.max_num_batched_tokens + 1
    # The bytes alone bound it, and that spares most of the steps.
    alone = max(1, shape.sequence_bytes(num_tokens))
    too_many = min(too_many, budget(1) // alone + 2)
    while too_many - held > 1:
        middle = (held + too_many) // 2
        if holds(middle):
            held = middle
        else:
            too_many = middle
    return held
