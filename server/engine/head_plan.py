"""From a model and a head profile to head groups."""

from importlib.metadata import version
from pathlib import Path

from headlong.cache.groups import HeadGroup, build_head_groups
from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.profiling.formats import load_head_profile
from headlong.profiling.model_identity import ModelIdentity
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.fingerprint import model_fingerprint
from headlong.server.engine.kv_cache_dtype import read_kv_cache_dtype
from headlong.server.engine.model import LoadedModel, ModelGeometry, ProbedModel
from headlong.server.errors import ConfigError


def plan_heads(config: EngineConfig, model: ProbedModel) -> tuple[HeadGroup, ...]:
    """Label every KV head and group them.

    Args:
        config: Names the profile and what overrides it.
        model: The model, with its weights or without.

    Returns:
        The head groups.

    Raises:
        ConfigError: The profile cannot be read or is another model's, or a setting is of heads that
            the model does not have.
    """
    geometry = model.geometry
    _check_kinds(config, geometry)
    if config.profile is None:
        if config.compensation == "on":
            raise ConfigError(
                "compensation needs a profile: without one no head drops tokens", "compensation"
            )
        labels = [[True] * geometry.num_kv_heads for _ in range(geometry.num_layers)]
        return build_head_groups(labels, RETRIEVAL, geometry.native_windows)
    try:
        profile = load_head_profile(Path(config.profile))
        profile.check_model(ModelIdentity.from_config(model.config))
        profile_labels = profile.labels(sparsity=config.sparsity, threshold=config.threshold)
        streaming = HeadPolicy(
            sink_size=profile.sink_size if config.sink_size is None else config.sink_size,
            window_size=profile.window_size if config.window_size is None else config.window_size,
        )
    except ValueError as error:
        raise ConfigError(f"profile {config.profile!r}: {error}", "profile") from error
    check_compensation(config, streaming.window_size)
    first, num_layers = config.compensation_from_layer, geometry.num_layers
    if config.compensation == "on" and first >= num_layers:
        raise ConfigError(
            f"compensation_from_layer must be below {num_layers}, the model's number of layers, "
            f"got {first}",
            "compensation_from_layer",
        )
    return build_head_groups(profile_labels, streaming, geometry.native_windows)


def _check_kinds(config: EngineConfig, geometry: ModelGeometry) -> None:
    """Refuse a format for heads of a kind that there are none of.

    Raises:
        ConfigError: One is named.
    """
    if "=" not in config.kv_cache_dtype:
        return
    named = read_kv_cache_dtype(config.kv_cache_dtype)
    if named["streaming"] != "auto" and config.profile is None:
        raise ConfigError(
            "kv_cache_dtype names streaming heads, but without a profile there are none",
            "kv_cache_dtype",
        )
    if named["sliding"] != "auto" and not any(geometry.native_windows):
        raise ConfigError(
            "kv_cache_dtype names sliding heads, but no layer has a window of its own",
            "kv_cache_dtype",
        )


def check_compensation(config: EngineConfig, window_size: int) -> None:
    """Refuse a window that is too small for the compensation that is asked for.

    Raises:
        ConfigError: It is.
    """
    if config.compensation == "on" and window_size < 2:
        # What a token adds to the sums is read from its page when the next one comes.
        raise ConfigError("compensation needs a window_size of at least 2", "compensation")


def retrieval_labels(groups: tuple[HeadGroup, ...], geometry: ModelGeometry) -> list[list[bool]]:
    """Which heads keep everything, layer by layer.

    Args:
        groups: The model's head groups.
        geometry: The model's.

    Returns:
        [num_layers][num_kv_heads].
    """
    keeps_all = {head for group in groups if group.policy.keeps_all for head in group.members}
    return [
        [(layer, head) in keeps_all for head in range(geometry.num_kv_heads)]
        for layer in range(geometry.num_layers)
    ]


def prefix_namespace(
    config: EngineConfig, model: LoadedModel, groups: tuple[HeadGroup, ...]
) -> bytes:
    """What determines K and V beside a sequence's tokens and policies: the prefix cache's root.

    Blocks that outlive the process are told apart by the model itself, whatever its name is, and by
    whose code made them.
    """
    lasting: tuple[str, ...] = ()
    if config.disk_cache_dir is not None:
        versions = map(version, ("headlong", "transformers", "torch"))
        lasting = (model_fingerprint(model.module), *versions)
    identity = (
        lasting,
        config.model,
        config.revision,
        str(model.dtype),
        str(model.geometry.kv_dtype),
        groups,
        config.kv_cache_dtype,
        config.compensation,
        config.compensation_from_layer,
        config.quantization,
        config.block_size,
        config.retrieval_budget,
        config.selection_reuse_steps,
        config.selection_min_similarity,
        config.seed if config.load_format == "dummy" else None,
    )
    return repr(identity).encode()
