"""All of a model's weights as one number, to know blocks that the same weights made."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

THREADS = 8
PART_BYTES = 64 << 20
"""A weight is hashed in parts of so many bytes, so that a large one keeps no others waiting."""


def weights_fingerprint(module: nn.Module) -> str:
    """BLAKE2b over every byte of every parameter and buffer; reads all memory of the model once."""
    names: list[str] = []
    parts: list[torch.Tensor] = []
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        for inner, plain in _plain_tensors(name, tensor.detach()):
            names.append(f"{inner} {plain.dtype} {tuple(plain.shape)}")
            data = plain.contiguous().reshape(-1).view(torch.uint8)
            parts += torch.split(data, PART_BYTES)
    digest = hashlib.blake2b("\n".join(names).encode())
    with ThreadPoolExecutor(THREADS) as pool:
        for each in pool.map(_digest, parts):
            digest.update(each)
    return digest.hexdigest()


def _plain_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a weight is made of: a quantised one is codes, scales and a rule."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    inner_names, rule = flatten()
    for inner in inner_names:
        yield from _plain_tensors(f"{name}.{inner} {rule}", getattr(tensor, inner))


def _digest(part: torch.Tensor) -> bytes:
    return hashlib.blake2b(part.cpu().numpy().data).digest()
