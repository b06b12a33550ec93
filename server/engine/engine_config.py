"""What the engine needs to know before it starts."""

import re
from dataclasses import dataclass, fields
from typing import Literal

from headlong.server.engine.kv_cache_dtype import read_kv_cache_dtype
from headlong.server.errors import ConfigError

DType = Literal["auto", "float32", "bfloat16", "float16"]
# The kernels' BackendName, stated again: this module must not import PyTorch.
AttentionBackendName = Literal["auto", "triton", "torch"]
LoadFormat = Literal["auto", "dummy"]
Quantization = Literal["int8wo", "int4wo", "fp8"]
Compensation = Literal["on", "off"]
ArenaBalance = Literal["slabs", "fixed"]
UNBOUNDED = 2**31 - 1
"""The kernels' window of a head that keeps everything, stated again for the same reason."""

MIN_BUDGET_BLOCKS = 8
"""Fewest blocks of a retrieval budget: the first, the newest, and some to choose."""

MAX_RANKS = 64
"""Ranks of one machine: none has more devices, and none of the models has more KV heads."""

_NOTHING_WITHOUT = {
    "compensation_from_layer": "compensation",
    "selection_reuse_steps": "retrieval_budget",
    "selection_min_similarity": "retrieval_budget",
    "disk_cache_dir": "host_cache_bytes",
    "disk_cache_bytes": "disk_cache_dir",
}
"""Settings that change nothing while another is left out."""


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
        dtype: Of weights and cache; "auto" is the checkpoint's own on CUDA and float32 on a CPU,
            which most CPUs compute fastest.
        device: "cpu", "cuda" or "cuda:N"; "auto" is CUDA where there is one, else the CPU.
        tensor_parallel_size: Ranks that compute the model together, each a process with a CUDA
            device of its own, or with its share of the CPU's cores.
        attention_backend: "triton" or "torch"; "auto" is Triton on CUDA, else PyTorch.
        enforce_eager: Launch every kernel of a decode anew, without CUDA graphs; a CPU always does,
            and so do several ranks.
        quantization: Bits of the weights of linear layers, by torchao: "int8wo" and "int4wo" keep
            activations as they are, "fp8" computes with both in 8 bits; None leaves them.
        load_format: "dummy" makes random weights of the checkpoint's shapes, and reads only its
            configuration and tokenizer.
        block_size: Tokens of a cache page.
        kv_cache_dtype: Format of K and V: "auto", a dtype, "fp8", "int8" or "int4", or one for each
            kind of head, as in "retrieval=int4,streaming=bf16"; see `read_kv_cache_dtype`.
        compensation: "on" lets streaming heads keep one entry that stands for all they dropped.
        compensation_from_layer: First layer, counted from 0, in which they do. Those of layer 0
            look for tokens, of which no mean tells anything.
        retrieval_budget: Most tokens that a retrieval head reads for a generated token, those of
            the pages that its query fits best; None reads all.
        selection_reuse_steps: Generated tokens that share a choice of pages, 1 to `block_size`; a
            choice never outlives a block.
        selection_min_similarity: Chooses anew, too, when the cosine of the query and the one that
            the choice was made for falls below this; None does not look.
        arena_balance: "slabs" lets all groups take memory as they need it, "fixed" gives each its
            share at start; several ranks always have fixed shares.
        host_cache_bytes: Memory of the host for blocks that the arena has no room for; 0 is none.
        disk_cache_dir: Folder for blocks that the host has no room for, found again after a
            restart; only with `host_cache_bytes`.
        disk_cache_bytes: Most bytes of files in it.
        kv_cache_memory_bytes: Size of the arena, or of each rank's; None is 1 GiB on a CPU, and on
            CUDA what `gpu_memory_utilization` leaves.
        gpu_memory_utilization: Fraction of a CUDA device's memory that weights, activations and KV
            cache may take together; None is 0.9. Only without `kv_cache_memory_bytes`.
        max_model_len: Most tokens of prompt and completion; None is the model's own limit.
        max_num_seqs: Most sequences that run at once.
        max_num_batched_tokens: Most tokens of one step.
        chunked_prefill_size: Most prompt tokens of a step in which others decode; None is a quarter
            of `max_num_batched_tokens`.
        enable_prefix_caching: Keep the blocks of finished requests findable.
        kv_policy_max_sink_size: Largest sink_size that a request may ask for.
        kv_policy_max_window_size: Largest window_size that a request may ask for; UNBOUNDED allows
            the full cache, 0 leaves every request to the profile.
        kv_policy_tokens: Tokens that requests with a wider policy hold in all, beside the windows
            of the others; the arena sets memory aside for them.
        canary_rate: Fraction of finished requests that is scored again over the full cache when
            the engine is idle.
        seed: Of requests that bring none of their own, and of dummy weights.
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
    tensor_parallel_size: int = 1
    attention_backend: AttentionBackendName = "auto"
    enforce_eager: bool = False
    quantization: Quantization | None = None
    load_format: LoadFormat = "auto"
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    compensation: Compensation = "off"
    compensation_from_layer: int = 1
    retrieval_budget: int | None = None
    selection_reuse_steps: int = 1
    selection_min_similarity: float | None = None
    arena_balance: ArenaBalance = "slabs"
    host_cache_bytes: int = 0
    disk_cache_dir: str | None = None
    disk_cache_bytes: int = 64 << 30
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    chunked_prefill_size: int | None = None
    enable_prefix_caching: bool = True
    kv_policy_max_sink_size: int = 1024
    kv_policy_max_window_size: int = UNBOUNDED
    kv_policy_tokens: int = 0
    canary_rate: float = 0.0
    seed: int = 0
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        def check(holds: bool, param: str, want: str) -> None:
            if not holds:
                raise ConfigError(f"{param} must be {want}, got {getattr(self, param)!r}", param)

        known = re.fullmatch("auto|cpu|cuda(:[0-9]+)?", self.device)
        check(known is not None, "device", "auto, cpu, cuda or cuda:N")
        check(
            1 <= self.tensor_parallel_size <= MAX_RANKS,
            "tensor_parallel_size",
            f"in 1 to {MAX_RANKS}",
        )
        many = self.tensor_parallel_size > 1
        check(
            not many or ":" not in self.device,
            "device",
            "one without a number when tensor_parallel_size is more than 1",
        )
        size = self.block_size
        check(
            8 <= size <= 256 and size & (size - 1) == 0, "block_size", "a power of two in 8 to 256"
        )
        read_kv_cache_dtype(self.kv_cache_dtype)
        budget = self.retrieval_budget
        check(
            budget is None or MIN_BUDGET_BLOCKS * size <= budget <= UNBOUNDED,
            "retrieval_budget",
            f"at least {MIN_BUDGET_BLOCKS} blocks of {size} tokens",
        )
        check(1 <= self.selection_reuse_steps <= size, "selection_reuse_steps", f"in 1 to {size}")
        similarity = self.selection_min_similarity
        check(
            similarity is None or -1.0 <= similarity <= 1.0,
            "selection_min_similarity",
            "in -1 to 1",
        )
        check(self.compensation_from_layer >= 0, "compensation_from_layer", "0 or more")
        defaults = {each.name: each.default for each in fields(self)}
        for name, needed in _NOTHING_WITHOUT.items():
            says_nothing = getattr(self, name) == defaults[name]
            check(
                says_nothing or getattr(self, needed) != defaults[needed],
                name,
                f"left out without {needed}",
            )
        check(
            similarity is None or self.selection_reuse_steps > 1,
            "selection_min_similarity",
            "left out while selection_reuse_steps is 1",
        )
        check(self.host_cache_bytes >= 0, "host_cache_bytes", "0 or more")
        check(self.disk_cache_bytes > 0, "disk_cache_bytes", "over 0")
        check(
            self.host_cache_bytes == 0 or self.enable_prefix_caching,
            "host_cache_bytes",
            "0 without a prefix cache",
        )
        for name, none in (("host_cache_bytes", 0), ("quantization", None)):
            check(
                not many or getattr(self, name) == none,
                name,
                f"{none} when tensor_parallel_size is more than 1",
            )
        check(self.sparsity is None or 0.0 <= self.sparsity <= 1.0, "sparsity", "in 0 to 1")
        both = self.sparsity is not None and self.threshold is not None
        check(not both, "threshold", "left out when sparsity is given")
        check(
            self.sink_size is None or 0 <= self.sink_size < 2**31, "sink_size", "in 0 to 2**31 - 1"
        )
        check(self.window_size is None or self.window_size >= 1, "window_size", "at least 1")
        check(0 <= self.seed < 2**63, "seed", "in 0 to 2**63 - 1")
        check(self.max_model_len is None or self.max_model_len >= 2, "max_model_len", "at least 2")
        check(self.max_num_seqs >= 1, "max_num_seqs", "at least 1")
        # Every running sequence must be able to decode in every step.
        least = f"at least max_num_seqs ({self.max_num_seqs})"
        check(self.max_num_batched_tokens >= self.max_num_seqs, "max_num_batched_tokens", least)
        chunk = self.chunked_prefill_size
        check(chunk is None or chunk >= 1, "chunked_prefill_size", "at least 1")
        for name in ("kv_policy_max_sink_size", "kv_policy_max_window_size", "kv_policy_tokens"):
            check(0 <= getattr(self, name) <= UNBOUNDED, name, f"in 0 to {UNBOUNDED}")
        check(0.0 <= self.canary_rate <= 1.0, "canary_rate", "in 0 to 1")
        memory = self.kv_cache_memory_bytes
        check(memory is None or memory > 0, "kv_cache_memory_bytes", "over 0")
        fraction = self.gpu_memory_utilization
        check(
            fraction is None or 0.0 < fraction <= 1.0,
            "gpu_memory_utilization",
            "over 0 and at most 1",
        )
        check(
            fraction is None or memory is None,
            "gpu_memory_utilization",
            "left out when kv_cache_memory_bytes is given",
        )
        for name in ("sparsity", "threshold", "sink_size", "window_size"):
            check(
                getattr(self, name) is None or self.profile is not None,
                name,
                "left out without a profile",
            )
