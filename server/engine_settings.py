"""Settings of the engine, as people give them."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_settings import BaseSettings, SettingsConfigDict

from headlong.server.config import ENV_PREFIX
from headlong.server.engine.engine_config import (
    UNBOUNDED,
    ArenaBalance,
    AttentionBackendName,
    Compensation,
    DType,
    EngineConfig,
    LoadFormat,
    Quantization,
)
from headlong.server.flag import Flag

_MODEL = "Model"
_HEADS = "Head profile"
_DEVICE = "Device"
_CACHE = "KV cache"
_COMPRESSION = "Compression"
_SCHEDULING = "Scheduling"
_PROFILES = "the profile's"


def _read_window(value: object) -> object:
    return UNBOUNDED if value == "full" else value


class EngineSettings(BaseSettings):
    """What of `EngineConfig` was given; what was not keeps the default that it has there."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid"
    )

    model: Annotated[str | None, Flag("Folder or hub id of a checkpoint.", _MODEL)] = None
    revision: Annotated[str | None, Flag("Branch, tag or commit of a hub checkpoint.", _MODEL)] = (
        None
    )
    trust_remote_code: Annotated[
        bool | None, Flag("Run code that the checkpoint brings along.", _MODEL)
    ] = None
    load_format: Annotated[
        LoadFormat | None, Flag("dummy makes random weights, for benchmarks.", _MODEL)
    ] = None
    max_model_len: Annotated[
        int | None,
        Flag("Most tokens of prompt and completion together.", _MODEL, default="the model's limit"),
    ] = None
    quantization: Annotated[
        Quantization | None,
        Flag("Weights of linear layers in 8 or 4 bits, by torchao.", _MODEL, default="none"),
    ] = None
    seed: Annotated[int | None, Flag("Of requests that bring none of their own.", _MODEL)] = None

    profile: Annotated[
        str | None,
        Flag(
            "Head profile; 'none' for a full cache.",
            _HEADS,
            default="the model folder's profile.json, if there is one",
        ),
    ] = None
    sparsity: Annotated[
        float | None,
        Flag("Fraction of KV heads that stream.", _HEADS, default=_PROFILES),
    ] = None
    threshold: Annotated[
        float | None, Flag("Least score of a retrieval head.", _HEADS, default=_PROFILES)
    ] = None
    sink_size: Annotated[
        int | None, Flag("First tokens that streaming heads keep.", _HEADS, default=_PROFILES)
    ] = None
    window_size: Annotated[
        int | None, Flag("Recent tokens that streaming heads keep.", _HEADS, default=_PROFILES)
    ] = None
    canary_rate: Annotated[
        float | None,
        Flag(
            "Fraction of requests that is scored again over the full cache in idle time, to "
            "measure what compression costs.",
            _HEADS,
        ),
    ] = None

    device: Annotated[
        str | None, Flag("auto, cpu, cuda or cuda:N; auto is CUDA where there is one.", _DEVICE)
    ] = None
    tensor_parallel_size: Annotated[
        int | None,
        Flag("Ranks that compute the model together, each on a CUDA device of its own.", _DEVICE),
    ] = None
    dtype: Annotated[
        DType | None,
        Flag("Of weights and cache; auto is float32 on a CPU, else the checkpoint's own.", _DEVICE),
    ] = None
    attention_backend: Annotated[
        AttentionBackendName | None,
        Flag("What computes attention; auto is triton on CUDA, else torch.", _DEVICE),
    ] = None
    enforce_eager: Annotated[bool | None, Flag("Do without CUDA graphs.", _DEVICE)] = None
    gpu_memory_utilization: Annotated[
        float | None,
        Flag(
            "Fraction of a CUDA device's memory for weights, activations and KV cache.",
            _DEVICE,
            default="0.9",
        ),
    ] = None

    kv_cache_memory_bytes: Annotated[
        int | None,
        Flag(
            "Size of the KV cache.",
            _CACHE,
            default="1 GiB on a CPU, else what --gpu-memory-utilization leaves",
        ),
    ] = None
    block_size: Annotated[int | None, Flag("Tokens of a cache page.", _CACHE)] = None
    enable_prefix_caching: Annotated[
        bool | None, Flag("Keep the blocks of finished requests findable.", _CACHE)
    ] = None
    arena_balance: Annotated[
        ArenaBalance | None,
        Flag(
            "slabs: head groups share the KV cache as they need it; fixed: each has its share from "
            "the start, as several ranks always have.",
            _CACHE,
        ),
    ] = None
    host_cache_bytes: Annotated[
        int | None,
        Flag("Memory of the host for blocks that the KV cache has no room for.", _CACHE),
    ] = None
    disk_cache_dir: Annotated[
        str | None,
        Flag(
            "Folder for blocks that --host-cache-bytes has no room for; they outlive the server.",
            _CACHE,
            default="none",
        ),
    ] = None
    disk_cache_bytes: Annotated[
        int | None, Flag("Most bytes of files in --disk-cache-dir.", _CACHE)
    ] = None
    kv_policy_max_sink_size: Annotated[
        int | None, Flag("Largest sink_size that a request's kv_policy may ask for.", _CACHE)
    ] = None
    kv_policy_max_window_size: Annotated[
        int | None,
        BeforeValidator(_read_window),
        Flag(
            "Largest window_size that a request's kv_policy may ask for; full allows the full "
            "cache, 0 leaves every request to the profile.",
            _CACHE,
            kind=str,
        ),
    ] = None
    kv_policy_tokens: Annotated[
        int | None,
        Flag("Tokens that requests with a wider kv_policy hold in all, set aside.", _CACHE),
    ] = None

    kv_cache_dtype: Annotated[
        str | None,
        Flag(
            "auto (as the layers make K and V), fp8, int8 or int4, or one for each kind of head: "
            "retrieval=int4,streaming=bf16.",
            _COMPRESSION,
        ),
    ] = None
    compensation: Annotated[
        Compensation | None,
        Flag("Streaming heads keep one entry that stands for all they dropped.", _COMPRESSION),
    ] = None
    compensation_from_layer: Annotated[
        int | None,
        Flag("First layer, counted from 0, with --compensation.", _COMPRESSION),
    ] = None
    retrieval_budget: Annotated[
        int | None,
        Flag(
            "Most tokens that a retrieval head reads for a generated token, by pages that fit its "
            "query.",
            _COMPRESSION,
            default="all",
        ),
    ] = None
    selection_reuse_steps: Annotated[
        int | None,
        Flag("Generated tokens that share a choice of pages; at most --block-size.", _COMPRESSION),
    ] = None
    selection_min_similarity: Annotated[
        float | None,
        Flag(
            "Least cosine of a query and the one that pages were chosen for; below it they are "
            "chosen anew.",
            _COMPRESSION,
            default="none",
        ),
    ] = None

    max_num_seqs: Annotated[int | None, Flag("Most sequences that run at once.", _SCHEDULING)] = (
        None
    )
    max_num_batched_tokens: Annotated[int | None, Flag("Most tokens of one step.", _SCHEDULING)] = (
        None
    )
    chunked_prefill_size: Annotated[
        int | None,
        Flag(
            "Most prompt tokens of a step in which others decode.",
            _SCHEDULING,
            default="a quarter of --max-num-batched-tokens",
        ),
    ] = None

    def to_engine_config(self, default_model: str) -> EngineConfig:
        """Checks the settings as a whole.

        A model's folder may hold its head profile as ``profile.json``; it is used unless another
        one, or "none", is given.

        Args:
            default_model: Used when no model was given.

        Raises:
            ConfigError: A value is out of range.
        """
        given: dict[str, Any] = self.model_dump(exclude_none=True)
        model = given.setdefault("model", default_model)
        beside = Path(model) / "profile.json"
        if self.profile is None and beside.is_file():
            given["profile"] = str(beside)
        elif self.profile == "none":
            del given["profile"]
        return EngineConfig(**given)
