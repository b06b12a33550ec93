"""torch.distributed's group of the ranks that compute one model together."""

import os
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from headlong.server.errors import ConfigError

TIMEOUT = timedelta(hours=2)
"""Of one collective: a rank may wait that long for the others to load. Idle ranks are in none."""


def join_group(store: Path, rank: int, num_ranks: int, device: torch.device) -> DeviceMesh:
    """Meet the other ranks, which run on this machine too.

    On CUDA the ranks talk through NCCL; on a CPU through gloo over the loopback interface, and they
    share out its cores.

    Args:
        store: A file that does not exist yet, where the ranks find each other.
        rank: This process's.
        num_ranks: All of them.
        device: This rank's.

    Returns:
        The ranks, in one dimension.

    Raises:
        ConfigError: This process is in a group already.
    """
    if dist.is_initialized():
        raise ConfigError(
            "tensor_parallel_size: another engine of this process runs on several ranks",
            "tensor_parallel_size",
        )
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    else:
        # gloo takes the interface of the host's name otherwise, which others can reach.
        for _, name in socket.if_nameindex():
            if name in ("lo", "lo0"):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        init_method=store.as_uri(),
        rank=rank,
        world_size=num_ranks,
        timeout=TIMEOUT,
        device_id=device if on_cuda else None,
    )
    return init_device_mesh(device.type, (num_ranks,))


def leave_group() -> None:
    """Forget the other ranks, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def least(value: int, device: torch.device) -> int:
    """The smallest of all ranks' values; every rank calls this."""
    tensor = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return int(tensor)
