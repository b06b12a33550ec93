"""How much memory the arena may take on this machine."""

from headlong.cache.capacity import CacheShape, CapacityError, MemoryPlan, plan_memory
from headlong.cache.groups import HeadGroup
from headlong.kernels.layout import ArenaLayout
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.model import LoadedModel
from headlong.server.errors import ConfigError

CPU_DEFAULT_BYTES = 1 << 30
"""Arena on a CPU when nothing is said: memory there is shared with everything else."""


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
    if wanted is not None and wanted > model.max_context:
        raise ConfigError(
            f"max_model_len is {wanted}, but the model was made for {model.max_context} tokens",
            "max_model_len",
        )
    max_model_len = model.max_context if wanted is None else wanted
    shape = CacheShape(
        groups=groups,
        head_dim=model.geometry.head_dim,
        dtype=model.dtype,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    budget = config.kv_cache_memory_bytes or CPU_DEFAULT_BYTES
    try:
        plan, layout = plan_memory(shape, budget, max_model_len)
    except CapacityError as error:
        raise ConfigError(str(error), "kv_cache_memory_bytes") from error
    if wanted is not None and plan.max_sequence_tokens < wanted:
        raise ConfigError(
            f"max_model_len is {wanted}, but {budget} bytes of KV cache hold a sequence of "
            f"{plan.max_sequence_tokens} tokens",
            "max_model_len",
        )
    return plan, layout
