"""A transformers checkpoint, loaded, probed for what it needs, and run over a packed batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from headlong.server.engine.attention import (
    ATTENTION_NAME,
    AttentionCall,
    AttentionProbe,
    PagedStep,
)
from headlong.server.engine.device import choose_device
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.head_dealing import HeadShare
from headlong.server.engine.tokenizer import load_tokenizer
from headlong.server.engine.weights import (
    dtype_name,
    first_line,
    load_weights,
    weights_dtype,
)
from headlong.server.errors import ConfigError

CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """What the cache needs to know of a model.

    Attributes:
        num_layers: Attention layers.
        num_q_heads: Query heads of a layer.
        num_kv_heads: KV heads of a layer.
        head_dim: Elements of a key.
        kv_dtype: Of keys and values, as the layers make them, and so of the cache.
        native_windows: [num_layers], a layer's own sliding window in tokens, or None.
    """

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: torch.dtype
    native_windows: tuple[int | None, ...]


@dataclass(frozen=True)
class ProbedModel:
    """A model's code and shapes, its weights there or not.

    Attributes:
        module: The transformers model, its attention being ours.
        config: Its text configuration.
        geometry: What the cache needs to know.
        max_context: Longest sequence the model was made for.
        device: Where it is.
        dtype: Of the weights, or of most of them.
    """

    module: PreTrainedModel
    config: PretrainedConfig
    geometry: ModelGeometry
    max_context: int
    device: torch.device
    dtype: torch.dtype

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return int(self.config.vocab_size)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        paged: PagedStep[Any] | AttentionProbe,
    ) -> torch.Tensor:
        """Run a packed batch.

        Args:
            input_ids: int64 [total_tokens].
            positions: int64 [total_tokens], of each token in its own sequence.
            rows: int64 [num_rows], tokens whose logits are wanted.
            paged: The step's attention.

        Returns:
            float32 [num_rows, vocab_size].
        """
        output = self.module(
            input_ids=input_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=rows,
            paged=paged,
        )
        logits: torch.Tensor = output.logits[0]
        return logits.float()


@dataclass(frozen=True)
class LoadedModel(ProbedModel):
    """A model ready to serve.

    Attributes:
        tokenizer: Its tokenizer.
        eos_token_ids: Tokens that end a completion.
        default_sampling: What its generation_config asks for, by SamplingParams field.
        share: The heads that are computed here, where several ranks compute the model; all else
            here is said of the whole model.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    default_sampling: Mapping[str, float | int]
    share: HeadShare | None = None

    @property
    def num_ranks(self) -> int:
        """Ranks that compute the model together."""
        return 1 if self.share is None else self.share.dealing.num_ranks


def load_model(config: EngineConfig) -> LoadedModel:
    """Load a checkpoint and check that the engine can run it.

    Args:
        config: Which one, and how.

    Returns:
        The model.

    Raises:
        ConfigError: The checkpoint is missing, truncated or incomplete, or the model needs a
            feature that is not supported, which the message names.
    """
    if config.tensor_parallel_size > 1:
        raise ConfigError(
            "tensor_parallel_size is for serving: here the model runs on one device",
            "tensor_parallel_size",
        )
    device = choose_device(config)
    return _load(config, device, device)


def load_on_host(config: EngineConfig, device: torch.device) -> LoadedModel:
    """Load a checkpoint into the host's memory, as it is to run on a device.

    Args:
        config: Which one, and how.
        device: Where it is to run.

    Returns:
        The model, on the CPU.

    Raises:
        ConfigError: As `load_model`.
    """
    return _load(config, device, torch.device("cpu"))


def _load(config: EngineConfig, device: torch.device, place: torch.device) -> LoadedModel:
    if config.model.startswith(("/", ".")) and not Path(config.model).is_dir():
        raise ConfigError(f"cannot load model {config.model!r}: there is no such folder", "model")
    tokenizer = load_tokenizer(config)
    module = load_weights(config, device, place)
    module.set_attn_implementation(ATTENTION_NAME)
    text_config = module.config.get_text_config()
    check_layer_types(text_config)
    generation = module.generation_config
    return LoadedModel(
        module=module,
        config=text_config,
        tokenizer=tokenizer,
        geometry=probe_geometry(module, place),
        max_context=max_context(text_config),
        eos_token_ids=_eos_token_ids(generation, text_config, tokenizer),
        default_sampling=_default_sampling(generation),
        device=place,
        dtype=weights_dtype(module),
    )


def check_layer_types(config: PretrainedConfig) -> None:
    """Refuse what lives in transformers' masks alone, where the probe would not see it."""
    kinds: set[str] = {*(getattr(config, "layer_types", None) or ())}
    kinds -= {"full_attention", "sliding_attention"}
    if getattr(config, "attention_chunk_size", None) is not None:
        kinds.add("chunked_attention")
    if kinds:
        raise ConfigError(f"layers of type {', '.join(sorted(kinds))} are not supported")


def probe_geometry(module: nn.Module, device: torch.device) -> ModelGeometry:
    """Run two tokens and see what each layer asks of attention."""
    probe = AttentionProbe()
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    try:
        with torch.inference_mode():
            module(
                input_ids=tokens,
                position_ids=torch.arange(2, device=device)[None],
                use_cache=False,
                logits_to_keep=torch.tensor([1], device=device),
                paged=probe,
            )
    except ConfigError:
        raise
    except Exception as error:  # whatever a model's own code raises
        raise ConfigError(
            f"{type(module).__name__} does not run without a cache of its own over a packed "
            f"batch: {first_line(error)}"
        ) from error
    calls = [probe.calls[layer] for layer in sorted(probe.calls)]
    config = module.config.get_text_config()  # type: ignore[union-attr, operator]
    if sorted(probe.calls) != list(range(config.num_hidden_layers)):
        raise ConfigError(
            f"{len(calls)} of {config.num_hidden_layers} layers use ordinary attention; "
            "linear, recurrent or shared layers are not supported"
        )
    shapes = {(call.num_q_heads, call.num_kv_heads, call.head_dim) for call in calls}
    if len(shapes) > 1:
        raise ConfigError(f"layers differ in heads or head size, not supported: {sorted(shapes)}")
    dtypes = {call.dtype for call in calls}
    if len(dtypes) > 1 or not dtypes.issubset(CACHE_DTYPES):
        found = ", ".join(sorted(map(dtype_name, dtypes)))
        raise ConfigError(f"a KV cache of {found} is not supported, choose a dtype", "dtype")
    first: AttentionCall = calls[0]
    return ModelGeometry(
        num_layers=len(calls),
        num_q_heads=first.num_q_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        kv_dtype=first.dtype,
        native_windows=tuple(call.window for call in calls),
    )


def max_context(config: PretrainedConfig) -> int:
    """Longest sequence that a model was made for, in tokens.

    Raises:
        ConfigError: Its configuration does not say, or its RoPE changes with the length.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        raise ConfigError("the model does not say how many positions it was made for")
    for rope in _rope_parameters(config):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "dynamic":
            # Its frequencies follow the longest sequence of a batch, so batch mates would differ.
            raise ConfigError("dynamic RoPE scaling is not supported")
        if kind == "longrope":
            # Beyond the original length transformers changes the frequencies of all positions,
            # those already cached too; up to it they are fixed.
            original = rope.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            limit = min(limit, original or limit)
    return limit


def _rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """RoPE settings, whether one set for the model or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _eos_token_ids(
    generation: GenerationConfig, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    found: set[int] = set()
    for ids in (generation.eos_token_id, config.eos_token_id, tokenizer.eos_token_id):
        many = ids if isinstance(ids, list) else [ids]
        known = (each for each in many if isinstance(each, int))
        found.update(each for each in known if 0 <= each < config.vocab_size)
    return frozenset(found)


def _default_sampling(generation: GenerationConfig) -> dict[str, float | int]:
    asked = {name: getattr(generation, name, None) for name in SAMPLING_DEFAULTS}
    defaults = {name: value for name, value in asked.items() if value is not None}
    if generation.do_sample is False:
        # A model that says it is to be decoded greedily, whatever else its file holds.
        defaults["temperature"] = 0.0
    return defaults
