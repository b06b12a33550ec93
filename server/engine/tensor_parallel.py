"""A model's layers cut among ranks: which it is done for, the order of heads, and the cut itself.

transformers' plan for a model says which projections are cut, and its hooks run the collectives. It
cuts rows into equal slices in the order in which they lie, so the heads are first brought into the
order in which they were dealt.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, PreTrainedModel
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.weights import source_of
from headlong.server.errors import ConfigError

PARAM = "tensor_parallel_size"

_HEAD_ROWS = ("q_proj", "k_proj", "v_proj")
_HEAD_COLUMNS = "o_proj"
_STYLES = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}


def check_num_ranks(config: EngineConfig) -> None:
    """Refuse a number of ranks that a checkpoint's configuration rules out, before any is started.

    A configuration that cannot be read, or does not say, is no error here: loading says more.

    Args:
        config: Names the checkpoint and the number of ranks.

    Raises:
        ConfigError: The number does not divide that of the KV heads.
    """
    try:
        settings = AutoConfig.from_pretrained(**source_of(config))
    except (OSError, ValueError):
        return
    num_kv_heads = getattr(settings.get_text_config(), "num_key_value_heads", None)
    if isinstance(num_kv_heads, int):
        _check_kv_heads(num_kv_heads, config.tensor_parallel_size)


def _check_kv_heads(num_kv_heads: int, num_ranks: int) -> None:
    if num_kv_heads % num_ranks:
        raise ConfigError(
            f"{PARAM} is {num_ranks}, which does not divide the model's {num_kv_heads} KV heads",
            PARAM,
        )


def check_divisible(
    module: PreTrainedModel, num_q_heads: int, num_kv_heads: int, head_dim: int, num_ranks: int
) -> None:
    """Refuse a model that cannot be cut among ranks so that each computes heads of its own.

    Args:
        module: The whole model.
        num_q_heads: Query heads of a layer.
        num_kv_heads: KV heads of a layer.
        head_dim: Elements of a key.
        num_ranks: Ranks.

    Raises:
        ConfigError: It cannot; the message says why.
    """
    name = type(module).__name__
    _check_kv_heads(num_kv_heads, num_ranks)
    if getattr(module.config, "quantization_config", None) is not None:
        raise ConfigError(f"{PARAM}: a quantised checkpoint cannot be cut among ranks", PARAM)
    plan = _plan(module)
    layers = list(_attention_layers(module))
    if len(layers) != module.config.get_text_config().num_hidden_layers:
        raise ConfigError(
            f"{PARAM}: the layers of {name} have no q_proj, k_proj, v_proj and o_proj to cut", PARAM
        )
    for path, attention in layers:
        for projection, style in _STYLES.items():
            if plan.get(f"{path}.{projection}") != style:
                raise ConfigError(
                    f"{PARAM}: transformers has no tensor parallel plan that cuts the attention of "
                    f"{name}",
                    PARAM,
                )
        _check_projections(path, attention, num_q_heads, num_kv_heads)
        for parameter, value in _other_parameters(attention):
            per_head = plan.get(f"{path}.{parameter}") == "colwise" and len(value) == num_q_heads
            if not per_head and value.numel() != head_dim:
                raise ConfigError(f"{PARAM}: {path}.{parameter} is of all heads at once", PARAM)


def _check_projections(
    path: str, attention: nn.Module, num_q_heads: int, num_kv_heads: int
) -> None:
    """Refuse projections in which a head's rows or columns could not be told from another's."""
    for name in _STYLES:
        weight = attention.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        heads = num_kv_heads if name in ("k_proj", "v_proj") else num_q_heads
        if weight.shape[name == _HEAD_COLUMNS] % heads:
            raise ConfigError(f"{PARAM}: {path}.{name} does not consist of {heads} heads", PARAM)


def order_heads(module: PreTrainedModel, orders: Sequence[Sequence[int]], num_q_heads: int) -> None:
    """Bring the heads of every layer into another order; what the model computes stays the same.

    The query heads of a KV head, its group, move with it.

    Args:
        module: The whole model, one that `check_divisible` takes.
        orders: [num_layers][num_kv_heads], which head comes to each place.
        num_q_heads: Query heads of a layer.
    """
    plan = _plan(module)
    for path, attention in _attention_layers(module):
        layer = attention.layer_idx
        assert isinstance(layer, int)
        kv_order = torch.tensor(orders[layer])
        group = num_q_heads // len(kv_order)
        q_order = (kv_order[:, None] * group + torch.arange(group)).flatten()
        if torch.equal(kv_order, torch.arange(len(kv_order))):
            continue
        for name in _HEAD_ROWS:
            order = q_order if name == "q_proj" else kv_order
            for parameter in attention.get_submodule(name).parameters():
                parameter.data = _reordered(parameter.data, order)
        columns = attention.get_submodule(_HEAD_COLUMNS).weight
        assert isinstance(columns, nn.Parameter)
        columns.data = _reordered(columns.data.T, q_order).T.contiguous()
        for name, parameter in _other_parameters(attention):
            if plan.get(f"{path}.{name}") == "colwise":
                parameter.data = _reordered(parameter.data, q_order)


def _reordered(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Equal runs of rows, one a head, in another order."""
    return rows.reshape(len(order), -1, *rows.shape[1:])[order].flatten(0, 1)


def cut_model(module: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Leave of a model what this rank computes.

    Every process that takes part in the mesh calls this with the same model.

    Args:
        module: The whole model, on the CPU. Its forward pass runs collectives from here on and
            returns the same logits on every rank.
        mesh: One-dimensional; the device type is where the weights go.
    """
    tied = _untie(module)
    apply_tensor_parallelism(module, mesh, _plan(module))
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                owner.register_parameter(name, _compact(parameter, mesh))
    for (owner, name), (first_owner, first_name) in tied.items():
        weight, first = getattr(owner, name), getattr(first_owner, first_name)
        if getattr(weight, "placements", None) == getattr(first, "placements", None):
            owner.register_parameter(name, first)


_Place = tuple[nn.Module, str]


def _untie(module: nn.Module) -> dict[_Place, _Place]:
    """Give each name a parameter of its own, as the cut goes by name; says which were one."""
    seen: dict[nn.Parameter, _Place] = {}
    tied: dict[_Place, _Place] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter in seen:
                tied[owner, name] = seen[parameter]
                owner.register_parameter(name, nn.Parameter(parameter.data, requires_grad=False))
            else:
                seen[parameter] = (owner, name)
    return tied


def _compact(parameter: DTensor, mesh: DeviceMesh) -> nn.Parameter:
    """The same slice in memory of its own: one cut by rows is a view of the whole weight."""
    local = parameter.to_local()
    if local.untyped_storage().nbytes() > local.nbytes:
        parameter = DTensor.from_local(
            local.clone(),
            mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    return nn.Parameter(parameter, requires_grad=False)


def _plan(module: PreTrainedModel) -> dict[str, str]:
    """The plan of transformers with the layers' numbers in place of its asterisks.

    Parameters come before the module that they belong to: a module's rule may need them cut.
    """
    rules: dict[str, str] = module.tp_plan
    plan: dict[str, str] = {}
    for path, child in module.named_modules():
        rule = rules.get(replace_layer_number_by_wildcard(path))
        for name, _ in child.named_parameters(recurse=False):
            parameter = f"{path}.{name}" if path else name
            style = rules.get(replace_layer_number_by_wildcard(parameter), rule)
            if style is not None:
                plan[parameter] = style
        if rule is not None:
            plan[path] = rule
    return plan


def _attention_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every attention layer with projections of its own."""
    for path, child in module.named_modules():
        if all(isinstance(getattr(child, name, None), nn.Linear) for name in _STYLES):
            yield path, child


def _other_parameters(attention: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What an attention layer has beside its projections."""
    for name, parameter in attention.named_parameters():
        if name.partition(".")[0] not in _STYLES:
            yield name, parameter
