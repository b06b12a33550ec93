"""GPUs by name, with the memory that CUDA reports.

A card's name promises more than a program can have: an "80 GB" A100 reports 79.15 GiB, because the
driver keeps a part and error correction takes another. The figures are those that PyTorch names in
its out-of-memory messages ("GPU 0 has a total capacity of ..."), `torch.cuda.mem_get_info`. Drivers
differ by some tenths of a GiB; where they do, the smaller figure is here. Compute capabilities are
those of NVIDIA's list, https://developer.nvidia.com/cuda-gpus.
"""

import re
from dataclasses import dataclass

from headlong.server.errors import ConfigError

LEAST_CAPABILITY = (8, 0)
"""The kernels need bfloat16 and asynchronous copies, which begin with Ampere."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU to plan for.

    Attributes:
        name: As it was asked for.
        total_bytes: Memory that CUDA reports, or that was asked for.
        capability: CUDA compute capability; None if it was given by its bytes.
    """

    name: str
    total_bytes: int
    capability: tuple[int, int] | None = None


def _gpu(name: str, gib: float, capability: tuple[int, int]) -> Gpu:
    return Gpu(name, int(gib * 2**30), capability)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("a10", 22.05, (8, 6)),
        _gpu("a10g", 22.05, (8, 6)),
        _gpu("a30", 23.50, (8, 0)),
        _gpu("a40", 44.42, (8, 6)),
        _gpu("a100-40g", 39.39, (8, 0)),
        _gpu("a100-80g", 79.15, (8, 0)),
        _gpu("b200", 178.35, (10, 0)),
        _gpu("h100-80g", 79.10, (9, 0)),
        _gpu("h200", 139.80, (9, 0)),
        _gpu("l4", 22.03, (8, 9)),
        _gpu("l40s", 44.39, (8, 9)),
        _gpu("rtx-3090", 23.57, (8, 6)),
        _gpu("rtx-4090", 23.52, (8, 9)),
        _gpu("rtx-5090", 31.36, (12, 0)),
        _gpu("rtx-a6000", 47.40, (8, 6)),
        _gpu("t4", 14.56, (7, 5)),
        _gpu("v100-16g", 15.77, (7, 0)),
        _gpu("v100-32g", 31.73, (7, 0)),
    )
}

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([a-z]*)")
MOST_BYTES = 1 << 50


def known_names() -> list[str]:
    """The names of the GPUs that the kernels run on."""
    return sorted(
        name for name, gpu in GPUS.items() if gpu.capability and gpu.capability >= LEAST_CAPABILITY
    )


def find_gpu(text: str) -> Gpu:
    """Find a GPU by its name, or take its bytes.

    Args:
        text: A name such as "a100-80g" ("A100 80GB" and "nvidia_a100_80gb" are the same), a number
            of bytes, or a number with a unit: "80GiB", "80 GB".

    Raises:
        ConfigError: There is no such GPU, or none that the kernels run on.
    """
    lowered = text.strip().lower()
    size = _SIZE.fullmatch(lowered)
    if size is not None and size[2] in _UNITS:
        total_bytes = int(float(size[1]) * _UNITS[size[2]]) if size[2] else _whole(size[1])
        if not 0 < total_bytes <= MOST_BYTES:
            raise ConfigError(f"gpu must have over 0 and at most {MOST_BYTES} bytes", "gpu")
        return Gpu(text.strip(), total_bytes)
    name = (
        re.sub(r"[\s_-]+", "-", lowered)
        .removeprefix("nvidia-")
        .removeprefix("geforce-")
        .removeprefix("tesla-")
    )
    name = re.sub(r"(?<=[0-9])gi?b$", "g", name)
    found = GPUS.get(name) or GPUS.get(re.sub(r"^rtx(?=[0-9])", "rtx-", name))
    if found is None:
        raise ConfigError(
            f"gpu {text[:40]!r} is not known; known are {', '.join(known_names())}, or give its "
            "memory, as in 80GiB",
            "gpu",
        )
    if found.capability is not None and found.capability < LEAST_CAPABILITY:
        major, minor = found.capability
        raise ConfigError(
            f"gpu {found.name} has compute capability {major}.{minor}, and the kernels need "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or more",
            "gpu",
        )
    return found


def _whole(number: str) -> int:
    """Bytes come whole: "80" is far more likely to be a card's GiB than eighty bytes."""
    if "." in number or int(number) < 1 << 20:
        raise ConfigError(f"gpu {number!r} needs a unit, as in 80GiB", "gpu")
    return int(number)
