"""What the engine asks of an attention backend, and which one there is for a device."""

import os
from typing import Any, Literal, Protocol, TypeVar

import torch

from headlong.kernels.batch import AttentionBatch, SelectionSettings
from headlong.kernels.layout import ArenaLayout

BackendName = Literal["auto", "triton", "torch"]

Plan = TypeVar("Plan")


class AttentionBackend(Protocol[Plan]):
    """Append and attend over one arena, for every layer of a model."""

    def plan(self, batch: AttentionBatch) -> Plan:
        """Work out once a step what every layer needs.

        Args:
            batch: The ragged batch, in the memory of the CPU.
        """
        ...

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor, plan: Plan) -> None:
        """Write the K and V of new tokens into their slots, and what pages say of them.

        Args:
            layer: Which layer's heads.
            key: [num_kv_heads, total_tokens, head_dim], after RoPE.
            value: [num_kv_heads, total_tokens, head_dim].
            plan: The step's plan.
        """
        ...

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        plan: Plan,
        *,
        sm_scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the new tokens over the cache, which already holds their K and V.

        Args:
            layer: Which layer's heads.
            query: [num_q_heads, total_tokens, head_dim], after RoPE.
            plan: The step's plan.
            sm_scale: Factor of the logits.
            softcap: Bound of the logits.
            sinks: [num_q_heads], learned sink logits.

        Returns:
            [total_tokens, num_q_heads, head_dim] in the query's dtype.
        """
        ...


def choose_backend(name: BackendName, device: torch.device) -> Literal["triton", "torch"]:
    """Settle "auto": Triton on a CUDA device, PyTorch elsewhere.

    Args:
        name: What was asked for.
        device: Where the arena lies.

    Returns:
        The backend's name.

    Raises:
        ValueError: Triton was asked for, or is needed, and cannot run on the device.
    """
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return "torch"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"attention_backend 'triton' needs a CUDA device, got {device.type!r} (with "
            "TRITON_INTERPRET=1 in the environment its interpreter runs on a CPU, very slowly)"
        )
    try:
        import triton  # noqa: F401, PLC0415
    except ImportError as error:
        raise ValueError(
            "attention_backend 'triton' needs the triton package: pip install 'headlong[gpu]', "
            "or take attention_backend 'torch'"
        ) from error
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(
            "attention_backend 'triton' needs a CUDA device of compute capability 8.0 or newer, "
            f"got {torch.cuda.get_device_name(device)}; take attention_backend 'torch'"
        )
    return "triton"


def make_backend(
    name: Literal["triton", "torch"],
    arena: torch.Tensor,
    layout: ArenaLayout,
    num_q_heads: int,
    selection: SelectionSettings | None = None,
) -> AttentionBackend[Any]:
    """Make a backend over an arena.

    Args:
        name: From `choose_backend`.
        arena: uint8 [total_bytes].
        layout: The arena's map.
        num_q_heads: Query heads of a layer.
        selection: How pages are chosen; None if no batch asks for it.

    Returns:
        The backend. What it plans is known to nobody but itself.
    """
    # Imported here: importing Triton takes a second and is not possible everywhere.
    if name == "triton":
        from headlong.kernels.triton_attention import TritonAttention  # noqa: PLC0415

        return TritonAttention(arena, layout, num_q_heads, selection)
    from headlong.kernels.torch_attention import TorchAttention  # noqa: PLC0415

    return TorchAttention(arena, layout, num_q_heads, selection)
