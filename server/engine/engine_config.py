"""What the engine needs to know before it starts."""

from dataclasses import dataclass
from typing import Literal

from headlong.server.errors import ConfigError

DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine, checked when made.

    Attributes:
        model: Folder or hub id of a checkpoint.
        profile: Head profile file, or None to keep every head's full cache.
        sparsity: Overrides the profile's own fraction of streaming heads.
        threshold: Overrides the profile's own least score of a retrieval head.
        sink_size: Overrides the profile's number of sink tokens.
        window_size: Overrides the profile's recent window, in tokens.
        dtype: Of weights and cache; "auto" is float32, which most CPUs compute fastest.
        device: "auto" or "cpu".
        block_size: Tokens of a cache page.
        kv_cache_memory_bytes: Size of the arena; None is 1 GiB.
        max_model_len: Most tokens of prompt and completion; None is the model's own limit.
        max_num_seqs: Most sequences that run at once.
        max_num_batched_tokens: Most tokens of one step.
        seed: Of requests that bring none of their own.
        revision: Branch, tag or commit of a hub checkpoint.
        trust_remote_code: Run code that a checkpoint brings along.

    Raises:
        ConfigError: A value is out of range; `param` names it.
    """

    model: str
    profile: str | None = None
    sparsity: float | None = None
    threshold: float | None = None
    sink_size: int | None = None
    window_size: int | None = None
    dtype: DType = "auto"
    device: str = "auto"
    block_size: int = 16
    kv_cache_memory_bytes: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    seed: int = 0
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        def check(holds: bool, param: str, want: str) -> None:
            if not holds:
                raise ConfigError(f"{param} must be {want}, got {getattr(self, param)!r}", param)

        size = self.block_size
        check(
            8 <= size <= 256 and size & (size - 1) == 0, "block_size", "a power of two in 8 to 256"
        )
        check(self.sparsity is None or 0.0 <= self.sparsity <= 1.0, "sparsity", "in 0 to 1")
        both = self.sparsity is not None and self.threshold is not None
        check(not both, "threshold", "left out when sparsity is given")
        check(self.sink_size is None or self.sink_size >= 0, "sink_size", "0 or more")
        check(self.window_size is None or self.window_size >= 1, "window_size", "at least 1")
        check(0 <= self.seed < 2**63, "seed", "in 0 to 2**63 - 1")
        check(self.max_model_len is None or self.max_model_len >= 2, "max_model_len", "at least 2")
        check(self.max_num_seqs >= 1, "max_num_seqs", "at least 1")
        # Every running sequence must be able to decode in every step.
        least = f"at least max_num_seqs ({self.max_num_seqs})"
        check(self.max_num_batched_tokens >= self.max_num_seqs, "max_num_batched_tokens", least)
        memory = self.kv_cache_memory_bytes
        check(memory is None or memory > 0, "kv_cache_memory_bytes", "over 0")
        for name in ("sparsity", "threshold", "sink_size", "window_size"):
            check(
                getattr(self, name) is None or self.profile is not None,
                name,
                "left out without a profile",
            )
