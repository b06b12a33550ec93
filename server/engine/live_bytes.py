"""Counts the bytes of live tensors while code runs, on any device, the meta device too.

On the meta device tensors have shapes and no memory: a model of any size runs there in a moment,
and what its tensors would take is known to the byte.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headlong.server.engine.weight_bytes import stored_tensors

_GROUPED_MM = torch.ops.aten._grouped_mm.default
_INT4_MM = torch.ops.aten._weight_int4pack_mm.default
_ROWS_OF_A_TILE = 8


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, follows every tensor that an operation makes until it is gone.

    Views count once, with what they are views of; tensors that were there before do not count. What
    an operation allocates inside itself and gives back is not seen, nor is what an allocator loses
    to rounding.

    Attributes:
        live_bytes: Of the tensors that are alive.
        peak_bytes: Most that `live_bytes` has been.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._followed: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and follow what it made."""
        given = dict(kwargs or {})
        known = {id(tensor.untyped_storage()) for tensor in _tensors((args, given))}
        result = _run(func, args, given)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self._followed and id(storage) not in known:
                self._followed.add(storage)
                self.live_bytes += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.nbytes()).atexit = False
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result

    def _forget(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of tensors that a call has at once, its result among them."""
    counter = LiveBytes()
    with counter:
        call()
    return counter.peak_bytes


def _tensors(values: object) -> list[torch.Tensor]:
    leaves = (each for each in tree_leaves(values) if isinstance(each, torch.Tensor))
    # A quantised weight has no memory itself, but its codes and scales have.
    return [stored for each in leaves for stored in stored_tensors(each)]


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    on_meta = bool(args) and isinstance(args[0], torch.Tensor) and args[0].device.type == "meta"
    if on_meta and func is _INT4_MM:
        # PyTorch's own shape rule asks the weights for a device that only fake tensors have.
        rows, tiles = args[0].shape[0], args[1].shape[0]
        return args[0].new_empty(rows, tiles * _ROWS_OF_A_TILE)
    if not on_meta or func is not _GROUPED_MM:
        return func(*args, **kwargs)
    # PyTorch's shape rule for products of experts' matrices takes bfloat16 alone, unlike its
    # kernels; the shapes are the same in every dtype.
    left, right, *rest = args
    result = func(left.to(torch.bfloat16), right.to(torch.bfloat16), *rest, **kwargs)
    return result.to(kwargs.get("out_dtype") or left.dtype)
