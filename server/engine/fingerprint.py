"""All that a model is as one number, to know blocks that the same model made."""

import hashlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

THREADS = 8
PART_BYTES = 64 << 20
"""A weight is hashed in parts of so many bytes, so that a large one keeps no others waiting."""


def model_fingerprint(module: PreTrainedModel) -> str:
    """Weights, configuration, and the code of every layer: two of them may share all weights."""
    digest = hashlib.blake2b(weights_fingerprint(module).encode())
    config = json.dumps(module.config.to_dict(), sort_keys=True, default=str)
    digest.update(config.encode())
    for name in sorted({type(layer).__module__ for layer in module.modules()}):
        file = sys.modules[name].__file__
        assert file is not None, "layers are not written in an interpreter's prompt"
        digest.update(hashlib.blake2b(Path(file).read_bytes()).digest())
    return digest.hexdigest()


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
