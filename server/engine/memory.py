"""How much memory the arena may take on this machine."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from headlong.cache.cache_shape import CacheShape
from headlong.cache.capacity import CapacityError, MemoryPlan, plan_memory
from headlong.cache.groups import HeadGroup
from headlong.kernels.layout import QUANTISATIONS, ArenaLayout, Quantisation
from headlong.kernels.torch_selection import most_chosen
from headlong.server.engine.attention import AttentionProbe
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.kv_cache_dtype import read_kv_cache_dtype
from headlong.server.engine.model import LoadedModel, ModelGeometry, ProbedModel
from headlong.server.engine.process_group import least
from headlong.server.engine.rank_plan import plan_ranks
from headlong.server.engine.scheduler import SCORED_TOKENS
from headlong.server.engine.selection import SelectionRule
from headlong.server.engine.weights import dtype_name
from headlong.server.errors import ConfigError

CPU_DEFAULT_BYTES = 1 << 30
"""Arena on a CPU when nothing is said: memory there is shared with everything else."""

GPU_DEFAULT_UTILIZATION = 0.9
"""Of a CUDA device's memory; the rest is for what is not measured, such as kernels' code."""

SAMPLING_COPIES = 16
"""Copies of a step's float32 logits that sampling and captured graphs have at once."""

SCORING_COPIES = 3
"""Copies of the logits of scored prompts: their log probabilities, and what makes them."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What a CUDA device's memory is needed for beside the cache, in bytes.

    Attributes:
        total_bytes: All that the device has.
        used_bytes: In use once the model is loaded, by everyone who uses the device.
        activation_bytes: Most that the layers of the largest step take.
        sampling_bytes: Taken by sampling.
        choices_bytes: Taken by the pages that heads have chosen.
    """

    total_bytes: int
    used_bytes: int
    activation_bytes: int
    sampling_bytes: int
    choices_bytes: int = 0

    def cache_bytes(self, utilization: float) -> int:
        """What is left for the cache: 0 or more.

        max(0, utilization * total - used - activation - sampling - choices)
        """
        for_steps = self.activation_bytes + self.sampling_bytes + self.choices_bytes
        return max(0, int(self.total_bytes * utilization) - self.used_bytes - for_steps)

    def explain(self, utilization: float) -> str:
        """The same, for the person who has to choose another fraction."""
        choices = f", chosen pages {_gib(self.choices_bytes)}" if self.choices_bytes else ""
        return (
            f"gpu_memory_utilization {utilization:g} of {_gib(self.total_bytes)} is "
            f"{_gib(int(self.total_bytes * utilization))}; {_gib(self.used_bytes)} are in use, a "
            f"step takes {_gib(self.activation_bytes)} and sampling {_gib(self.sampling_bytes)}"
            f"{choices}, which leaves {_gib(self.cache_bytes(utilization))} of KV cache"
        )


def plan_arena(
    config: EngineConfig, model: LoadedModel, groups: tuple[HeadGroup, ...]
) -> tuple[MemoryPlan, ArenaLayout]:
    """Size the arena.

    Args:
        config: Bounds and sizes.
        model: The loaded model.
        groups: Its head groups.

    Returns:
        The plan and the arena's map.

    Raises:
        ConfigError: The memory holds no sequence, or not one of the length asked for.
    """
    wanted = config.max_model_len
    max_model_len = longest_wanted(config, model)
    shape = cache_shape(config, model.geometry, groups)
    budget = _budget(config, model, groups)
    try:
        plan, layout = (
            plan_memory(shape, budget.num_bytes, max_model_len)
            if model.share is None
            else plan_ranks(shape, budget.num_bytes, max_model_len, model.share.dealing)
        )
    except CapacityError as error:
        raise ConfigError(f"{error}{budget.origin}", budget.param) from error
    if wanted is not None and plan.max_sequence_tokens < wanted:
        raise ConfigError(
            f"max_model_len is {wanted}, but {budget.num_bytes} bytes of KV cache hold a sequence "
            f"of {plan.max_sequence_tokens} tokens{budget.origin}",
            "max_model_len",
        )
    return plan, layout


def longest_wanted(config: EngineConfig, model: ProbedModel) -> int:
    """Longest sequence that is to be served, if the memory holds it.

    Raises:
        ConfigError: The model was made for shorter ones.
    """
    wanted = config.max_model_len
    if wanted is not None and wanted > model.max_context:
        raise ConfigError(
            f"max_model_len is {wanted}, but the model was made for {model.max_context} tokens",
            "max_model_len",
        )
    return model.max_context if wanted is None else wanted


def utilization_of(config: EngineConfig) -> float:
    """Fraction of a CUDA device's memory that weights, activations and cache may take."""
    asked = config.gpu_memory_utilization
    return GPU_DEFAULT_UTILIZATION if asked is None else asked


def cache_shape(
    config: EngineConfig, geometry: ModelGeometry, groups: tuple[HeadGroup, ...]
) -> CacheShape:
    """What sizes the cache of a model, beside its bytes."""
    return CacheShape(
        groups=groups,
        head_dim=geometry.head_dim,
        dtype=geometry.kv_dtype,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        wide_tokens=config.kv_policy_tokens,
        in_slabs=config.arena_balance == "slabs" and config.tensor_parallel_size == 1,
        formats=page_formats(config, geometry),
        summarised=config.retrieval_budget is not None,
        compensated=config.compensation == "on",
        compensated_from=config.compensation_from_layer,
    )


def page_formats(config: EngineConfig, geometry: ModelGeometry) -> Mapping[str, Quantisation]:
    """How each kind of head stores K and V, where not as the layers make them.

    Raises:
        ConfigError: A dtype is asked for that the layers do not make, or a format that does not fit
            the heads.
    """
    chosen = read_kv_cache_dtype(config.kv_cache_dtype)
    if "int4" in chosen.values() and geometry.head_dim % 2:
        raise ConfigError(
            "kv_cache_dtype int4 stores two elements in a byte, but the model's heads have "
            f"{geometry.head_dim}",
            "kv_cache_dtype",
        )
    own = dtype_name(geometry.kv_dtype)
    for kind, name in chosen.items():
        if name not in ("auto", own) and name not in QUANTISATIONS:
            raise ConfigError(
                f"kv_cache_dtype of {kind} heads is {name}, but the layers make {own} K and V; "
                f"that is --dtype {name}",
                "kv_cache_dtype",
            )
    return MappingProxyType(
        {kind: QUANTISATIONS[name] for kind, name in chosen.items() if name in QUANTISATIONS}
    )


def arena_param(config: EngineConfig, device: torch.device) -> str:
    """The setting that the arena's size comes from."""
    measured = device.type == "cuda" and config.kv_cache_memory_bytes is None
    return "gpu_memory_utilization" if measured else "kv_cache_memory_bytes"


@dataclass(frozen=True, slots=True)
class _Budget:
    """Bytes of the arena, the setting that they come from, and how if that is not plain."""

    num_bytes: int
    param: str
    origin: str = ""


def _budget(config: EngineConfig, model: LoadedModel, groups: tuple[HeadGroup, ...]) -> _Budget:
    param = arena_param(config, model.device)
    if param == "kv_cache_memory_bytes":
        return _Budget(config.kv_cache_memory_bytes or CPU_DEFAULT_BYTES, param)
    utilization = utilization_of(config)
    choices = choices_bytes(config, model, groups, model.num_ranks)
    memory = replace(_measure(config, model), choices_bytes=choices)
    num_bytes = memory.cache_bytes(utilization)
    if model.share is not None:
        num_bytes = least(num_bytes, model.device)
    return _Budget(num_bytes, param, f" ({memory.explain(utilization)})")


def _measure(config: EngineConfig, model: LoadedModel) -> DeviceMemory:
    """Run the largest step on the model's CUDA device and see what it takes."""
    device = model.device
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        run_largest_step(model, config.max_num_batched_tokens, config.max_num_seqs)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of {config.max_num_batched_tokens} tokens does not fit the memory of {device} "
            "beside the weights",
            "max_num_batched_tokens",
        ) from error
    activation_bytes = torch.cuda.max_memory_reserved(device) - before
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return DeviceMemory(
        total_bytes=total_bytes,
        used_bytes=total_bytes - free_bytes,
        activation_bytes=activation_bytes,
        sampling_bytes=sampling_bytes(config.max_num_seqs, model.vocab_size),
    )


def sampling_bytes(max_num_seqs: int, vocab_size: int) -> int:
    """Most bytes that sampling, and scoring prompts, take beside a step's own logits."""
    num_copied_rows = SAMPLING_COPIES * max_num_seqs + SCORING_COPIES * SCORED_TOKENS
    return num_copied_rows * vocab_size * 4


def choices_bytes(
    config: EngineConfig, model: ProbedModel, groups: tuple[HeadGroup, ...], num_ranks: int = 1
) -> int:
    """Bytes in which a rank remembers the pages that its heads have chosen, and for what queries.

    Args:
        config: How pages are chosen, and for how many sequences.
        model: The model.
        groups: Its head groups.
        num_ranks: Ranks that share out the heads.
    """
    rule = SelectionRule.of(config)
    if rule is None:
        return 0
    geometry = model.geometry
    shape = cache_shape(config, geometry, groups)
    settings = rule.settings(longest_wanted(config, model))
    query_bytes = 0
    if settings.min_similarity is not None:
        group_size = geometry.num_q_heads // geometry.num_kv_heads
        query_bytes = group_size * geometry.head_dim * geometry.kv_dtype.itemsize
    return sum(
        settings.num_places
        * -(-len(group.members) // num_ranks)
        * (most_chosen(settings, shape.page(group)) * torch.int32.itemsize + query_bytes)
        for group in groups
        if shape.page(group).summarised
    )


def run_largest_step(
    model: ProbedModel, max_num_batched_tokens: int, max_num_seqs: int
) -> torch.Tensor:
    """Run the step that takes most memory, without a cache: what it takes sizes the arena.

    Returns:
        float32 [num_rows, vocab_size], of no meaning.
    """
    num_rows = min(max_num_batched_tokens, max_num_seqs + SCORED_TOKENS)
    return run_without_cache(model, max_num_batched_tokens, num_rows)


@torch.inference_mode()
def run_without_cache(model: ProbedModel, num_tokens: int, num_rows: int) -> torch.Tensor:
    """Run all of a step but its attention.

    Args:
        model: The model.
        num_tokens: Tokens of the step; may be more than the model's context, as a step holds many
            sequences.
        num_rows: Rows of logits, at most `num_tokens`.

    Returns:
        float32 [num_rows, vocab_size], of no meaning.
    """
    rows = torch.arange(num_tokens, device=model.device)
    return model.forward(
        torch.zeros_like(rows), rows % model.max_context, rows[:num_rows], AttentionProbe()
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
