"""How people say in which format K and V of each kind of head are stored. Imports no PyTorch."""

from types import MappingProxyType

from headlong.server.errors import ConfigError

HEAD_KINDS = ("retrieval", "streaming", "sliding")
"""Heads that keep all, those that the profile lets stream, and those of a layer's own window."""

KV_FORMATS = ("auto", "float32", "bfloat16", "float16", "fp8", "int8", "int4")
"""auto: as the layers make them. A dtype by name must be that one."""

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def read_kv_cache_dtype(text: str) -> MappingProxyType[str, str]:
    """Read such a text: one format for all heads, or one for each kind.

    "int8" is all heads; "retrieval=int4,streaming=bf16" leaves the kinds that it does not name as
    the layers make them.

    Args:
        text: What was given.

    Returns:
        The format of each of `HEAD_KINDS`.

    Raises:
        ConfigError: A kind or a format is not known, or a kind comes twice.
    """
    whole = _SHORT.get(text, text)
    if whole in KV_FORMATS:
        return MappingProxyType(dict.fromkeys(HEAD_KINDS, whole))
    chosen: dict[str, str] = {}
    for part in text.split(","):
        kind, equals, name = (each.strip() for each in part.partition("="))
        name = _SHORT.get(name, name)
        if not equals or kind not in HEAD_KINDS or kind in chosen or name not in KV_FORMATS:
            raise ConfigError(
                f"kv_cache_dtype must be one of {', '.join(KV_FORMATS)}, or such as "
                f"retrieval=int4,streaming=bf16 (kinds are {', '.join(HEAD_KINDS)}), got {text!r}",
                "kv_cache_dtype",
            )
        chosen[kind] = name
    return MappingProxyType({kind: chosen.get(kind, "auto") for kind in HEAD_KINDS})
