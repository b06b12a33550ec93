"""Which model a head profile belongs to."""

import hashlib
import json
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from transformers import PreTrainedConfig

from headlong.profiling.errors import UnsupportedModelError

FINGERPRINT_LENGTH = 16
"""Hex digits kept of the SHA-256: 64 bits, enough to tell the models of one user apart."""


class ModelIdentity(BaseModel):
    """The numbers that a head profile has in common with its model.

    Attributes:
        architecture: The text model's ``model_type`` in transformers, ``"qwen3"``; ``""`` unknown.
        num_layers: Attention layers.
        num_kv_heads: KV heads of one layer.
        head_dim: Channels of one head's keys; 0 unknown.
        fingerprint: Hex digest over the config fields that decide attention; ``""`` unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str = ""
    num_layers: Annotated[int, Field(ge=1, strict=True)]
    num_kv_heads: Annotated[int, Field(ge=1, strict=True)]
    head_dim: Annotated[int, Field(ge=0, strict=True)] = 0
    fingerprint: Annotated[str, Field(pattern=r"^([0-9a-f]{8,64})?$")] = ""

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> Self:
        """Reads the identity off a transformers config.

        A composite config (text and vision, say) stands for its text part. ``head_dim`` falls back
        to ``hidden_size // num_attention_heads`` and ``num_key_value_heads`` to
        ``num_attention_heads``, as in transformers' own model code.

        The fingerprint covers architecture, layers, query heads, KV heads, head_dim, hidden size,
        RoPE parameters, sliding window, layer types and vocabulary size. It does not cover paths,
        dtype or the version of transformers, so that one checkpoint has one fingerprint.

        Raises:
            UnsupportedModelError: If the config lacks a number of layers, heads or a hidden size.
        """
        text = config.get_text_config()
        num_layers = _required_int(text, "num_hidden_layers")
        num_q_heads = _required_int(text, "num_attention_heads")
        hidden_size = _required_int(text, "hidden_size")
        num_kv_heads = getattr(text, "num_key_value_heads", None) or num_q_heads
        head_dim = getattr(text, "head_dim", None) or hidden_size // num_q_heads
        fields: dict[str, JsonValue] = {
            "architecture": text.model_type,
            "num_layers": num_layers,
            "num_q_heads": num_q_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "hidden_size": hidden_size,
            "rope_parameters": getattr(text, "rope_parameters", None),
            "sliding_window": getattr(text, "sliding_window", None),
            "layer_types": getattr(text, "layer_types", None),
            "vocab_size": getattr(text, "vocab_size", None),
        }
        return cls(
            architecture=text.model_type,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            fingerprint=_digest(fields),
        )

    def differences(self, other: Self) -> list[tuple[str, int | str, int | str]]:
        """Lists the fields in which two identities differ, where both know the field.

        Returns:
            ``(field, own value, other's value)``, in the order of the fields.
        """
        differing: list[tuple[str, int | str, int | str]] = []
        for field in type(self).model_fields:
            own, others = getattr(self, field), getattr(other, field)
            if own and others and own != others:
                differing.append((field, own, others))
        return differing


def _required_int(config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise UnsupportedModelError(
            f"a {config.model_type!r} config has no usable {name}: {value!r}"
        )
    return value


def _digest(fields: dict[str, JsonValue]) -> str:
    text = json.dumps(_canonical(fields), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_LENGTH]


def _canonical(value: JsonValue) -> JsonValue:
    """Makes equal numbers equal text: a checkpoint may say 10000 where another says 10000.0."""
    if isinstance(value, dict):
        # A setting that is None is one that another version of transformers may not write.
        return {str(key): _canonical(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
