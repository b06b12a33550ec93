"""From a configuration to one rank's model, cache plan and arena; every rank does the same.

The whole checkpoint is opened in the host's memory first: safetensors maps the files, so the ranks
share the pages of one copy, and what a rank keeps are its slices. Weights that are converted while
they load (another dtype, experts that are stacked) take a whole copy for each rank for that while.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from headlong.cache.capacity import MemoryPlan
from headlong.cache.groups import HeadGroup
from headlong.kernels.layout import ArenaLayout
from headlong.server.engine.device import choose_device
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.head_dealing import HeadShare, deal_heads
from headlong.server.engine.head_plan import plan_heads, retrieval_labels
from headlong.server.engine.memory import plan_arena
from headlong.server.engine.model import LoadedModel, load_on_host, probe_geometry
from headlong.server.engine.process_group import join_group
from headlong.server.engine.runner import LocalRunner, open_runner
from headlong.server.engine.tensor_parallel import check_divisible, cut_model, order_heads
from headlong.server.errors import ConfigError


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model with its cache.

    Attributes:
        groups: The model's head groups.
        plan: What was sized, over all ranks.
        layout: The map of the whole cache.
        runner: Computes steps here.
    """

    groups: tuple[HeadGroup, ...]
    plan: MemoryPlan
    layout: ArenaLayout
    runner: LocalRunner


def load_share(config: EngineConfig, rank: int) -> LoadedModel:
    """Load a model and bring its heads into the order in which they are dealt.

    Args:
        config: Which model, and how.
        rank: Which rank this is.

    Returns:
        The whole model, on the host, with the rank's share of its heads named.

    Raises:
        ConfigError: As `load_model`, or the model cannot be cut among the ranks.
    """
    whole = load_on_host(config, choose_device(config, rank))
    module, geometry = whole.module, whole.geometry
    num_ranks = config.tensor_parallel_size
    check_divisible(
        module, geometry.num_q_heads, geometry.num_kv_heads, geometry.head_dim, num_ranks
    )
    labels = retrieval_labels(plan_heads(config, whole), geometry)
    dealing = deal_heads(labels, num_ranks)
    orders = [dealing.order(layer) for layer in range(geometry.num_layers)]
    order_heads(module, orders, geometry.num_q_heads)
    return replace(whole, share=HeadShare(dealing, rank))


def open_cut(config: EngineConfig, model: LoadedModel, store: Path) -> OpenedModel:
    """Meet the other ranks, keep this one's part of a model, and allocate its part of the cache.

    All ranks do so together.

    Args:
        config: What sizes the cache.
        model: From `load_share`.
        store: A file that does not exist yet, where the ranks find each other.

    Raises:
        ConfigError: The profile or the memory do not allow it.
    """
    share = model.share
    assert share is not None, "from load_share"
    device = choose_device(config, share.rank)
    mesh = join_group(store, share.rank, model.num_ranks, device)
    try:
        cut_model(model.module, mesh)
        nn.Module.to(model.module, device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the part of model {config.model!r} of one of {model.num_ranks} ranks does not fit "
            f"the memory of {device}"
        ) from error
    cut = replace(model, device=device)
    _check_cut(cut)
    return open_model(config, cut)


def open_model(config: EngineConfig, model: LoadedModel) -> OpenedModel:
    """Size the cache of a model and allocate it, or this rank's part of it.

    Args:
        config: What sizes it.
        model: The model, or this rank's part of it.

    Raises:
        ConfigError: The profile or the memory do not allow it.
    """
    groups = plan_heads(config, model)
    plan, layout = plan_arena(config, model, groups)
    runner = open_runner(config, model, groups, layout, plan.max_sequence_tokens)
    return OpenedModel(groups, plan, layout, runner)


def _check_cut(model: LoadedModel) -> None:
    """See in a forward pass whether a rank's layers have its heads alone."""
    cut = probe_geometry(model.module, model.device)
    own = (cut.num_q_heads * model.num_ranks, cut.num_kv_heads * model.num_ranks)
    if own != (model.geometry.num_q_heads, model.geometry.num_kv_heads):
        raise ConfigError(
            f"tensor_parallel_size: {type(model.module).__name__} computes {cut.num_kv_heads} KV "
            f"heads on each of {model.num_ranks} ranks, of {model.geometry.num_kv_heads} in all",
            "tensor_parallel_size",
        )
