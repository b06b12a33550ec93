"""From a checkpoint, or from random numbers, to a transformers model on its device."""

import hashlib
import logging
from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.weight_bytes import stored_tensors
from headlong.server.engine.weight_quantisation import (
    Processor,
    describe_quantisation,
    quantise_weights,
)
from headlong.server.errors import ConfigError

logger = logging.getLogger(__name__)


def load_weights(
    config: EngineConfig, device: torch.device, place: torch.device | None = None
) -> Any:
    """Load a model's weights, or make them.

    Args:
        config: Which checkpoint, and how.
        device: Where it is to run.
        place: Where it goes; by default there.

    Returns:
        The transformers model, its attention being transformers' own eager one, ready to run.

    Raises:
        ConfigError: The checkpoint is missing, truncated or incomplete, does not fit the device, or
            cannot be quantised as asked.
    """
    place = device if place is None else place
    try:
        if config.load_format == "dummy":
            module = _random(config, device, place)
        else:
            module = _stored(config, device)
        module.eval().requires_grad_(False)
        if config.quantization is not None:
            quantise_weights(module, config.quantization, place)
            told = describe_quantisation(
                config.quantization, Processor.of(place), weights_dtype(module)
            )
            logger.info("quantization %s: %s", config.quantization, told)
        return module.to(place)
    except ConfigError:
        raise
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"model {config.model!r} does not fit the memory of {place}") from error
    except Exception as error:  # transformers and safetensors raise many kinds
        raise ConfigError(f"cannot load model {config.model!r}: {first_line(error)}") from error


def source_of(config: EngineConfig) -> dict[str, Any]:
    """Arguments that every `from_pretrained` of transformers takes."""
    return {
        "pretrained_model_name_or_path": config.model,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
    }


def weights_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of most elements: a checkpoint may keep some weights in a wider one."""
    elements: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        if parameter.is_floating_point():
            elements[parameter.dtype] += parameter.numel()
    return elements.most_common(1)[0][0]


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over some hundred elements of each weight, evenly spread: tells checkpoints apart."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        for stored in stored_tensors(parameter):
            flat = stored.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 256)].float().cpu()
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """As the command line and a checkpoint's configuration spell it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def first_line(error: BaseException) -> str:
    """What an error says, short enough for one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def wanted_dtype(config: EngineConfig, device: torch.device) -> torch.dtype | None:
    """The dtype to compute in; None is the checkpoint's own."""
    if config.dtype != "auto":
        named: torch.dtype = getattr(torch, config.dtype)
        return named
    return torch.float32 if device.type == "cpu" else None


def _stored(config: EngineConfig, device: torch.device) -> Any:
    if config.quantization is not None:
        _refuse_quantised(AutoConfig.from_pretrained(**source_of(config)), config)
    # Eager until probed: transformers checks a name against what a class says it supports.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **source_of(config),
        dtype=wanted_dtype(config, device) or "auto",
        attn_implementation="eager",
        output_loading_info=True,
    )
    module, info = loaded
    missing = sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])})
    if missing:
        raise ConfigError(
            f"checkpoint {config.model!r} lacks {len(missing)} weights, the first is {missing[0]!r}"
        )
    return module


def _refuse_quantised(settings: PretrainedConfig, config: EngineConfig) -> None:
    quantised = getattr(settings, "quantization_config", None)
    if quantised is not None:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ConfigError(
            f"quantization must be left out: checkpoint {config.model!r} is quantised already "
            f"({kind or 'of unknown kind'})",
            "quantization",
        )


def _random(config: EngineConfig, device: torch.device, place: torch.device) -> Any:
    """Weights as the model's own initialisation draws them, made where they are to lie."""
    settings = AutoConfig.from_pretrained(**source_of(config))
    if getattr(settings, "quantization_config", None) is not None:
        raise ConfigError(
            "dummy weights of a quantised checkpoint are not supported", "load_format"
        )
    return make_model(settings, config, place, device)


def make_model(
    settings: PretrainedConfig,
    config: EngineConfig,
    device: torch.device,
    runs_on: torch.device | None = None,
) -> Any:
    """Make a model of random weights; on the meta device it has shapes and no weights.

    Args:
        settings: The checkpoint's configuration.
        config: Its dtype, its seed and whether its own code may run.
        device: Where the weights are to lie.
        runs_on: Where the model is to run, which its dtype may depend on; by default there.

    Returns:
        The transformers model, its attention being transformers' own eager one.
    """
    dtype = wanted_dtype(config, device if runs_on is None else runs_on)
    if dtype is None:
        # transformers leaves a name or a dtype here, on the model's part or on the whole.
        stored: Any = settings.get_text_config().dtype or settings.dtype or torch.float32
        dtype = getattr(torch, stored) if isinstance(stored, str) else stored
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(forked), device:
        torch.manual_seed(config.seed)
        return AutoModelForCausalLM.from_config(
            settings,
            dtype=dtype,
            attn_implementation="eager",
            trust_remote_code=config.trust_remote_code,
        )
