"""A model from its configuration alone: all of its shapes, none of its weights.

transformers' own code builds it on PyTorch's meta device, where tensors have no memory, and the
probe that the engine runs at load runs there too. So every architecture that the engine serves can
be planned for, to the byte, and every one that it refuses is refused in the same words.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from headlong.kernels.batch import UNBOUNDED
from headlong.profiling.files import read_json_object
from headlong.server.engine.attention import ATTENTION_NAME
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.gpus import LEAST_CAPABILITY
from headlong.server.engine.live_bytes import LiveBytes
from headlong.server.engine.model import (
    ProbedModel,
    check_layer_types,
    max_context,
    probe_geometry,
)
from headlong.server.engine.weight_quantisation import Processor, quantise_shapes
from headlong.server.engine.weights import make_model, source_of, weights_dtype
from headlong.server.errors import ConfigError

META = torch.device("meta")
LEAST_GPU = Processor("cuda", LEAST_CAPABILITY)
CONFIG_FILE = "config.json"
NEEDED = ("hidden_size", "num_hidden_layers")
"""What the text model of every checkpoint says of itself."""

NEEDED_UNLESS_NESTED = (
    "vocab_size",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
"""What a text model inside a larger one may leave to its architecture, as Gemma 3's do."""

DERIVED = ("num_key_value_heads", "head_dim")
"""What some architectures work out from the rest, and others set to the size of one model."""

MOST = {
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 16,
    "hidden_size": 1 << 24,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 28,
    "max_position_embeddings": UNBOUNDED,
}
"""Sizes that no model has; PyTorch would build one of them until the memory or the day ends."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def meta_model(config: EngineConfig, processor: Processor = LEAST_GPU) -> ProbedModel:
    """Build a model without weights, and check that the engine can run it.

    Args:
        config: Its `model` is a folder, a configuration file or a hub id; of the rest, `dtype`,
            `quantization`, `revision` and `trust_remote_code` count. The dtype "auto" is the
            checkpoint's own, as on a GPU.
        processor: The GPU that is to compute it, which the format of quantised weights depends on.

    Returns:
        The model on the meta device.

    Raises:
        ConfigError: The configuration cannot be read or lacks what is needed, or the model needs a
            feature that is not supported, which the message names.
    """
    settings = read_settings(config)
    text = settings.get_text_config()
    check_layer_types(text)
    longest = max_context(text)
    try:
        module = make_model(settings, config, META).eval().requires_grad_(False)
        module.set_attn_implementation(ATTENTION_NAME)
    except Exception as error:  # transformers raises many kinds
        raise _unreadable(config, error) from error
    if config.quantization is not None:
        quantise_shapes(module, config.quantization, processor)
    with LiveBytes():
        geometry = probe_geometry(module, META)
    return ProbedModel(
        module=module,
        config=text,
        geometry=geometry,
        max_context=longest,
        device=META,
        dtype=weights_dtype(module),
    )


def read_settings(config: EngineConfig) -> PretrainedConfig:
    """Read a checkpoint's configuration, and refuse one that says too little to plan with.

    transformers fills in what a file leaves out, with the sizes of whichever model its authors had
    in mind; a plan for that one would be wrong and look right.

    Raises:
        ConfigError: It cannot be read, lacks what is needed, or is of a quantised checkpoint.
    """
    path = _local_file(config.model)
    if path is not None:
        _check_said(config, read_json_object(path))
        config_source = source_of(config) | {"pretrained_model_name_or_path": str(path)}
    else:
        config_source = source_of(config)
    try:
        with _quiet_hub():
            said, _ = PretrainedConfig.get_config_dict(**config_source)
            _check_said(config, said)
            settings: PretrainedConfig = AutoConfig.from_pretrained(**config_source)
    except Exception as error:  # transformers and the hub raise many kinds
        raise _unreadable(config, error) from error
    _check_fields(config, settings, said)
    quantised = getattr(settings, "quantization_config", None)
    if quantised is not None:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ConfigError(
            f"{config.model} is a quantised checkpoint ({kind or 'of unknown kind'}), and what it "
            "takes cannot be told from its configuration",
            "model",
        )
    if config.dtype == "auto" and (settings.get_text_config().dtype or settings.dtype) is None:
        raise ConfigError(f"{config.model} names no dtype: choose one", "dtype")
    return settings


def _local_file(model: str) -> Path | None:
    """The configuration's file; None if it is on the hub."""
    path = Path(model)
    if path.is_dir():
        path = path / CONFIG_FILE
        if not path.is_file():
            raise ConfigError(f"{model} holds no {CONFIG_FILE}", "model")
        return path
    if path.exists():
        return path
    if path.suffix == ".json" or model.startswith((".", "~")) or not _HUB_ID.fullmatch(model):
        raise ConfigError(f"{model}: no such file", "model")
    return None


def _check_said(config: EngineConfig, said: Mapping[str, Any]) -> None:
    """Checks what can be checked before transformers works with it."""
    _check_sizes(config, said)
    kind = said.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(f"{config.model} names no model_type", "model")
    if kind not in CONFIG_MAPPING and not (config.trust_remote_code and "auto_map" in said):
        raise ConfigError(
            f"{config.model}: transformers {transformers.__version__} knows no model_type {kind!r}",
            "model",
        )


def _check_fields(
    config: EngineConfig, settings: PretrainedConfig, said: Mapping[str, Any]
) -> None:
    text = settings.get_text_config()
    inner = next((said[name] for name in settings.sub_configs if settings is not text
                  and name in said and getattr(settings, name, None) is text), None)  # fmt: skip
    spoken = inner if isinstance(inner, Mapping) else said
    needed: tuple[str, ...] = NEEDED
    if spoken is said:
        set_by_class = (name for name in DERIVED if getattr(type(text), name, None) is not None)
        needed = (*NEEDED, *NEEDED_UNLESS_NESTED, *set_by_class)
    missing = [
        name
        for name in needed
        # A name that the architecture does not have cannot be left out.
        if hasattr(text, name)
        and spoken.get(name) is None
        and spoken.get(text.attribute_map.get(name, name)) is None
    ]
    if missing:
        raise ConfigError(f"{config.model} says nothing of {', '.join(missing)}", "model")
    # Whatever the file calls them, and those that the architecture set.
    _check_sizes(config, {name: getattr(text, name, None) for name in MOST})


def _check_sizes(config: EngineConfig, sizes: Mapping[str, Any]) -> None:
    for inner in sizes.values():
        if isinstance(inner, Mapping):
            _check_sizes(config, inner)
    for name, most in MOST.items():
        value = sizes.get(name)
        if isinstance(value, int) and not 1 <= value <= most:
            told = f"{config.model}: {name} must be in 1 to {most}, got {str(value)[:20]}"
            raise ConfigError(told, "model")


def _unreadable(config: EngineConfig, error: Exception) -> ConfigError:
    if isinstance(error, ConfigError):
        return error
    told = " ".join(str(error).split()) or type(error).__name__
    if told.startswith("Unrecognized configuration class"):
        told = "it is no causal language model"
    sentence = told.split(". ")[0] if len(told) > 200 else told
    return ConfigError(f"cannot plan for {config.model}: {sentence[:300]}", "model")


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keeps the hub's client from telling of every try to connect; the error says it once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
