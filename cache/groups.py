"""Head groups: the heads of all layers that share a policy."""

from collections.abc import Sequence
from dataclasses import dataclass

from headlong.cache.policy import RETRIEVAL, HeadPolicy

RETRIEVAL_HEADS = "retrieval"
"""Name, and kind, of the group that keeps all."""

STREAMING = "streaming"
"""Name of the group whose policy comes from the profile, so that a request may ask for another."""

SLIDING = "sliding"
"""Kind of the groups that keep a model's own windows, whatever a request asks for."""


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """Heads that keep the same tokens, so that one block table serves them all.

    Attributes:
        name: "retrieval", "streaming", or "sliding-4096" for a model's own window of 4096 tokens.
        policy: What each of them keeps.
        members: Their (layer, kv_head) pairs, sorted.
    """

    name: str
    policy: HeadPolicy
    members: tuple[tuple[int, int], ...]

    @property
    def kind(self) -> str:
        """Which of the three kinds it is: retrieval, streaming or sliding."""
        return self.name.partition("-")[0]


def build_head_groups(
    retrieval: Sequence[Sequence[bool]],
    streaming: HeadPolicy,
    native_windows: Sequence[int | None],
) -> tuple[HeadGroup, ...]:
    """Group the heads of a model.

    A layer with a window of its own keeps that window whatever the labels say: its heads were
    trained with it and see nothing outside.

    Args:
        retrieval: [num_layers][num_kv_heads], True for a retrieval head.
        streaming: Policy of the others.
        native_windows: [num_layers], a layer's own sliding window in tokens, or None.

    Returns:
        The groups that have members: retrieval, streaming, then one for each native window.

    Raises:
        ValueError: The lengths differ.
    """
    if len(retrieval) != len(native_windows):
        raise ValueError(
            f"retrieval has {len(retrieval)} layers, native_windows has {len(native_windows)}"
        )
    members: dict[tuple[str, HeadPolicy], list[tuple[int, int]]] = {
        (RETRIEVAL_HEADS, RETRIEVAL): [],
        (STREAMING, streaming): [],
    }
    for layer, (labels, window) in enumerate(zip(retrieval, native_windows, strict=True)):
        for head, keeps_all in enumerate(labels):
            if window is not None:
                key = (f"sliding-{window}", HeadPolicy(sink_size=0, window_size=window))
            else:
                key = (RETRIEVAL_HEADS, RETRIEVAL) if keeps_all else (STREAMING, streaming)
            members.setdefault(key, []).append((layer, head))
    return tuple(
        HeadGroup(name, policy, tuple(heads)) for (name, policy), heads in members.items() if heads
    )
