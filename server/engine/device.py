"""Where a model runs: the device, what computes attention there, and how tensors get there."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from headlong.kernels.backend import choose_backend
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.errors import ConfigError

_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def choose_device(config: EngineConfig, rank: int = 0) -> torch.device:
    """Settle the device, and refuse what was asked for and means nothing there.

    Args:
        config: Its `device` is one that `EngineConfig` accepts.
        rank: Whose device; with several ranks, each has the CUDA device of its number.

    Returns:
        The CPU, or a CUDA device with its index.

    Raises:
        ConfigError: There is no such device, or the settings do not suit it.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cpu") if name == "cpu" else _cuda_device(name)
    if device.type == "cuda" and config.tensor_parallel_size > 1:
        count = torch.cuda.device_count()
        if config.tensor_parallel_size > count:
            raise ConfigError(
                f"tensor_parallel_size is {config.tensor_parallel_size}, but there are {count} "
                "CUDA devices",
                "tensor_parallel_size",
            )
        device = rank_device(device, rank)
    if device.type == "cpu" and config.gpu_memory_utilization is not None:
        raise ConfigError(
            "gpu_memory_utilization is for a CUDA device, and the device is cpu: there, "
            "kv_cache_memory_bytes sizes the KV cache",
            "gpu_memory_utilization",
        )
    return device


def _cuda_device(name: str) -> torch.device:
    if not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r}, but PyTorch finds no CUDA device", "device")
    _, _, number = name.partition(":")
    index = int(number) if number else torch.cuda.current_device()
    count = torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"device is {name!r}, but there are {count} CUDA devices", "device")
    return torch.device("cuda", index)


def rank_device(device: torch.device, rank: int) -> torch.device:
    """Where one of several ranks computes, if any of them computes on `device`."""
    return torch.device("cuda", rank) if device.type == "cuda" else device


def choose_attention(config: EngineConfig, device: torch.device) -> Literal["triton", "torch"]:
    """Settle the attention backend.

    Raises:
        ConfigError: The one asked for cannot run on the device.
    """
    try:
        return choose_backend(config.attention_backend, device)
    except ValueError as error:
        raise ConfigError(str(error), "attention_backend") from error


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Bring a tensor from the CPU to a device, without waiting for what the device has to do."""
    if device.type == "cuda":
        # From pageable memory a copy would wait for all kernels launched before it.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device this thread's current one, which is where Triton launches its kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a tensor found no memory, on whichever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # PyTorch's allocator on a CPU, cuBLAS and pinned memory raise a plain RuntimeError.
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def free_memory(device: torch.device) -> None:
    """Hand memory that no tensor uses back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
